"""Load a tokenizer from a folder or the Hub so that its ids match its tokenizer.json.

Inputs: a folder or Hub name. Outputs: a fast tokenizer. Not handled here: tokenising text
(`data.prepare.text`). This module is imported when the command line starts, so it imports nothing
heavy at the top.
"""

from __future__ import annotations

import functools
import json
import logging
import numbers
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scaledistill.distributed.launcher import stated_rank
from scaledistill.errors import DataError
from scaledistill.models.hub import model_folder
from scaledistill.storage.files import is_path, near_folder, no_such_folder, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "config.json",  # names the tokenizer's class if the tokenizer's own files do not
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)
"""The files of a model folder that a tokenizer needs."""
DEFINITION = "tokenizer.json"
SENTENCEPIECE = "*.model"
VOCABULARY_FILES = (DEFINITION, "vocab.txt", "vocab.json", SENTENCEPIECE)
PROBES = (
    "The Quick BROWN fox doesn't re-tokenise, does it? (No!)",
    " a leading space, then  two, a\ttab,\n\nnew lines\r\nand a no-break\u00a0space ",
    "na\u00efve caf\u00e9 \u00dcniversit\u00e4t",  # composed
    "nai\u0308ve cafe\u0301 U\u0308niversita\u0308t",  # combining
    "\u5317\u4eac\u5e02 \u6771\u4eac \ud55c\uad6d\uc5b4 \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\u0130stanbul stra\u00dfe",
    "3.14159 & 1,000 x\u00b2=\u03b1 \ufb01ne \uff21\uff22\uff23\uff11 \u00bd \u2167",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \u2764\ufe0f \u201cquoted\u201d \u2014 $5 @user #tag "
    "<b> a_b snake_case",
)
"""Texts that reveal different rules in tokenizers that share a vocabulary."""
_SEGMENTS = "token_type_ids"
_COMPANIONS = "expected tokenizer.json and its companions, as save_pretrained writes them"


def _find(name_or_folder: str | Path, revision: str | None) -> Path:
    """Return a tokenizer's folder; for a Hub name, that of its downloaded or cached files."""
    name, folder = str(name_or_folder), Path(name_or_folder)
    if folder.is_dir():
        return folder
    remedy = (
        "expected a folder with tokenizer.json, or a Hub name that is cached or reachable from here"
    )
    if is_path(name_or_folder):
        raise DataError(f"tokenizer {name!r}: {no_such_folder(name_or_folder, remedy)}")
    if near := near_folder(name):
        remedy = f"did you mean {near}?"
    try:  # AutoTokenizer asks for each file in turn, and retries each one without a network
        return model_folder(name, revision, TOKENIZER_FILES)
    except Exception as error:
        version = f" at revision {revision!r}" if revision else ""
        raise DataError(
            f"tokenizer {name!r}: no such folder, and the Hub gave none{version} "
            f"({_first_line(error)}); {remedy}"
        ) from error


def load_tokenizer(
    name_or_folder: str | Path, revision: str | None = None
) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer with its truncation and padding switched off.

    Remote code is never run. If the folder has a tokenizer.json, the ids are those of that file:
    transformers rebuilds some classes from their vocabulary alone, and if the result differs,
    tokenizer.json is loaded as a `PreTrainedTokenizerFast` instead. Token type ids are among the
    outputs if and only if the model in the folder has more than one type, whatever the tokenizer's
    class says.

    Raises:
        DataError: it cannot be found, loaded or used, it has no vocabulary, or it has no fast form.
    """
    name = str(name_or_folder)
    folder = _find(name_or_folder, revision)
    if not has_vocabulary_file(folder):
        # transformers would invent a vocabulary of special tokens only: all text would be [UNK].
        own_code = "auto_map" in (read_json(folder / "tokenizer_config.json") or {})
        raise DataError(
            f"tokenizer {name!r} cannot be loaded: {folder} has none of "
            f"{', '.join(VOCABULARY_FILES)}; {_COMPANIONS}: copy them there from the original "
            f"model{' (remote code is never run)' if own_code else ''}"
        )
    try:
        tokenizer = _load(folder)
        reason = _problem(tokenizer, folder)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in tokenizers (Rust) is not an Exception
        raise DataError(
            f"tokenizer {name!r} cannot be loaded: {_first_line(error)}; {_COMPANIONS} (remote "
            "code is never run)"
        ) from error
    if reason:
        raise DataError(f"tokenizer {name!r} cannot be used: {reason}")
    tokenizer.name_or_path = name  # rather than the folder in the Hub cache
    return tokenizer


def has_vocabulary_file(folder: Path) -> bool:
    """Return whether a folder has a file with a tokenizer's vocabulary."""
    return any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES)


def _load(folder: Path) -> PreTrainedTokenizerFast:
    """Load a folder's tokenizer; errors of transformers and tokenizers pass through."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    for file in (DEFINITION, "tokenizer_config.json"):
        if (folder / file).is_file() and read_json(folder / file) is None:
            raise ValueError(f"its {file} is not a JSON object")
    others = [name for name in VOCABULARY_FILES if name != SENTENCEPIECE]
    if not any((folder / name).is_file() for name in others) and not find_spec("sentencepiece"):
        raise ValueError(
            "its only vocabulary is that of SentencePiece, which transformers converts with two "
            "more packages: pip install sentencepiece protobuf"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    if type(tokenizer).__name__ == "EsmTokenizer":
        tokenizer = _fast_esm(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer")
    if (folder / DEFINITION).is_file():
        tokenizer = _as_defined(tokenizer, Tokenizer.from_file(str(folder / DEFINITION)), folder)
    if (types := _num_token_types(folder)) is not None:
        return_token_types(cast("PreTrainedTokenizerFast", tokenizer), types > 1)
    # Some files silently truncate and pad: all-MiniLM-L6-v2's tokenizer.json does, to 128 tokens.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return cast("PreTrainedTokenizerFast", tokenizer)


def _fast_esm(slow: Any) -> PreTrainedTokenizerFast:
    """Return the fast form of ESM's tokenizer, which transformers has in Python only.

    Text is split at white space and around each token of the vocabulary.

    Raises:
        ValueError: it gives other ids.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = sorted(filter(None, slow.all_tokens), key=len, reverse=True)
    backend = Tokenizer(models.WordLevel(slow.get_vocab(), unk_token=slow.unk_token))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("|".join(map(re.escape, tokens))), "isolated"),
        ]
    )
    names = ("cls_token", "eos_token", "pad_token", "mask_token", "unk_token")
    cls, eos = slow.cls_token, slow.eos_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {eos}",
        pair=f"{cls} $A {eos} $B {eos}",
        special_tokens=[(cls, slow.cls_token_id), (eos, slow.eos_token_id)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=slow.model_input_names,
        model_max_length=slow.model_max_length,
        **{name: getattr(slow, name) for name in names},
    )
    for text in (*PROBES, "".join(slow.all_tokens)):
        if fast(text)["input_ids"] != slow(text)["input_ids"]:
            raise ValueError(f"its fast form reads {text!r} differently")
    return fast


def _as_defined(tokenizer: Any, defined: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """Return `tokenizer` if its ids match `defined` (tokenizer.json), else a wrapped `defined`.

    Special tokens keep their names. What tokenizer.json does not define is taken from `tokenizer`:
    tokens that only the other files add, and the post-processor if there is none.
    """
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:  # loaded from tokenizer.json already
        return tokenizer
    built = tokenizer.backend_tokenizer
    known = defined.get_vocab()
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.content not in known:
            add = defined.add_special_tokens if token.special else defined.add_tokens
            add([token])
    if defined.post_processor is None:
        defined.post_processor = built.post_processor
    if _definition(defined) == _definition(built):
        return tokenizer
    differing = next(
        (text for text in PROBES if _plain_ids(defined, text) != _plain_ids(built, text)), None
    )
    if differing is not None:
        _warn_once(folder, type(tokenizer).__name__, differing)
    names = {
        name: token for name, token in tokenizer._special_tokens_map.items() if token is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=defined,
        model_input_names=tokenizer.model_input_names,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        extra_special_tokens=tokenizer.extra_special_tokens,
        chat_template=tokenizer.chat_template,
        **names,
    )


@functools.cache
def _warn_once(folder: Path, tokenizer_class: str, text: str) -> None:
    """Warn once per process, on rank 0, that a rebuilt tokenizer differs from its file."""
    if stated_rank() == "0":
        log.warning(
            "tokenizer %s: transformers rebuilds it as %s, which reads %r differently from its "
            "tokenizer.json; tokenizer.json is used",
            folder,
            tokenizer_class,
            text,
        )


def return_token_types(tokenizer: PreTrainedTokenizerFast, wanted: bool) -> None:
    """Make a tokenizer return token type ids, or stop it from doing so; it is saved so too."""
    names = [name for name in tokenizer.model_input_names if name != _SEGMENTS]
    if wanted == (_SEGMENTS in tokenizer.model_input_names):
        return
    names += [_SEGMENTS] if wanted else []
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names


def _num_token_types(folder: Path) -> int | None:
    """Return how many token types the folder's model has; None if there is none that says so."""
    from transformers import CONFIG_MAPPING

    config = read_json(folder / "config.json") or {}
    types = config.get("type_vocab_size")
    if types is None and config.get("model_type") in CONFIG_MAPPING:
        types = getattr(CONFIG_MAPPING[config["model_type"]](), "type_vocab_size", None)
    return types if isinstance(types, int) else None


def gives_same_ids(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Return whether two tokenizers have one definition and give a model the same inputs."""
    same_inputs = (_SEGMENTS in one.model_input_names) == (_SEGMENTS in other.model_input_names)
    return same_inputs and _definition(one.backend_tokenizer) == _definition(
        other.backend_tokenizer
    )


def pad_on_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    """Let a tokenizer pad batches on the right; whatever pads is masked."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:  # decoders
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def _definition(backend: Tokenizer) -> dict[str, Any]:
    """Return the parts of a tokenizer's JSON that determine its ids."""
    whole = json.loads(backend.to_str())
    return {
        name: value
        for name, value in whole.items()
        if name not in ("version", "truncation", "padding", "decoder")
    }


def _plain_ids(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _problem(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str | None:
    """Return why a loaded tokenizer cannot be used, or None.

    Errors that tokenizers raises while it encodes the probes pass through.
    """
    length = tokenizer.model_max_length
    if not isinstance(length, numbers.Real) or isinstance(length, bool):
        return f"model_max_length in its tokenizer_config.json is {length!r}; expected a number"
    backend = tokenizer.backend_tokenizer
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        return (
            f"it has no tokens but {', '.join(tokenizer.all_special_tokens)}, so that all text "
            f"would be unknown; {_COMPANIONS}, all from the same model"
        )
    stated = _stated_tokens(backend, folder)
    for name in ("cls", "sep"):
        token = getattr(tokenizer, f"{name}_token")
        if token is not None and token not in stated:
            return (
                f"its {name}_token {token!r} is not in its vocabulary; correct it in "
                "tokenizer_config.json, or copy the files from the original model"
            )
    if (
        not (folder / DEFINITION).is_file()
        and json.loads(backend.to_str())["model"].get("merges") == []
    ):
        return (
            f"{folder} has a vocabulary but no merges (merges.txt), so that all text would be "
            "split into single letters"
        )
    # Encoding pairs exercises the post-processor too: a broken one fails here, not during a run.
    backend.encode_batch([(probe, probe) for probe in PROBES])
    return None


def _stated_tokens(backend: Tokenizer, folder: Path) -> set[str]:
    """Return the tokens that the files define.

    The loaded tokenizer cannot be asked: transformers gives missing special tokens new ids.
    """
    if (folder / DEFINITION).is_file():
        definition = read_json(folder / DEFINITION) or {}
        added = [token["content"] for token in definition.get("added_tokens") or []]
    else:
        config = read_json(folder / "tokenizer_config.json") or {}
        added = [token["content"] for token in (config.get("added_tokens_decoder") or {}).values()]
        added += read_json(folder / "added_tokens.json") or {}
    return {*backend.get_vocab(with_added_tokens=False), *added}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
