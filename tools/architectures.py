"""Print docs/architectures.md, made from the table in `scaledistill.models.architectures`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from scaledistill.models.architectures import ARCHITECTURES, Architecture

PAGE = """\
# Architectures

<!-- Made by `python tools/architectures.py > docs/architectures.md`; change the table in
scaledistill/models/architectures.py or the text in tools/architectures.py instead. -->

A teacher, with any head or none, is a model of one of these types (`model_type` in its
`config.json`). Its student has the same type, or any other of them
(`students.<name>.architecture`), and any depth, width, number of heads and FFN width. Decoders are
distilled as text encoders, without their head: the student learns what their layers compute, not to
generate.
An unsupported type is refused with the list of the supported ones; `CONTRIBUTING.md` has the recipe
for adding one.

| architecture | `model_type` | Q, K and V are the outputs of | attention | `data.attention` |
|---|---|---|---|---|
{rows}

## What is captured

Q, K and V are the outputs of the projections of the captured block, for teacher and student alike.
So they are taken before rotary embeddings of positions, and before norms of queries and keys.
Keys and values of grouped-query attention are taken as they are projected, narrower than queries.
In pre-norm models the block's input norm is applied first. The final norm is not: it belongs to
the model's output. The output of a fused projection is split. Nothing above the projections is
computed.

## Attention

`sdpa` is PyTorch's fused attention, used by default. `eager` keeps the scores in memory; the models
that have only this are slower and need memory that grows with the square of the sequence length.
With `data.attention="document"`, `sdpa` and `eager` get a block mask; on GPUs that have
`varlen_attn`, in 16 bits and without dropout of attention, it replaces `sdpa`. In layers with a
window (local, sliding) it applies within each document.

In causal models tokens attend to themselves and earlier tokens only. Their relations are causal
too, in every backend: the row of a token has no columns of later ones. `is_causal: false` in the
config of a Llama, Mistral, Qwen2 or Qwen3 model, and `use_bidirectional_attention: true` in that of
a Gemma 3 (EmbeddingGemma), makes both bidirectional. Teacher and student must both be causal or
both not. Shards of a tokenizer without [CLS] and [SEP] have its tokens of beginning and end there,
or that of the end in both places.

## Grouped queries

In models with `num_key_value_heads` several query heads share a head of keys and values. The
relation heads must divide each width that a pair uses: that of queries is `num_attention_heads` ×
`head_dim`, that of keys and values `num_key_value_heads` × `head_dim`. Pairs of unequal widths,
such as `qk`, are refused. A student has by default as many query heads a group as its teacher
(`students.<name>.num_key_value_heads`), and heads as wide as the teacher's if these are not
`hidden_size` / `num_attention_heads` wide (`students.<name>.head_dim`).

## Students

With `init: "random"` all sizes are free; heads that are rotated must have an even size. With
`init: "teacher"` the sizes are at most the teacher's, and equal sizes give an exact copy. Otherwise
a student gets the first heads, and the first components of every other axis. Heads of grouped
queries are cut in whole groups: the first groups, and the first query heads of each. Of each head a
student keeps the first components too; where heads are rotated, evenly spaced pairs of components,
so that each pair turns about as fast as before. Norms of queries and keys keep the same components,
and so do both halves of a gated FFN. Gemma's embeddings are multiplied by the square root of the
width, so a narrower student's table is scaled for the same product.

`layer_map` is spread evenly by default. A student of a model with global and local layers keeps the
teacher's pattern of them, counted from its own first layer, and each layer is copied from the
nearest teacher layer of the same kind. A student's FFN is by default {factors} its width.

A student of another type than the teacher's shares its vocabulary, special tokens and maximal
length, and starts from random weights or from the folder of a model of its type. All else is the
default of transformers' config class, except: {defaults}.

With `data.attention="document"`, teacher and student must both support it. Each model gets the
inputs of its own kind: position ids that start after the padding id for RoBERTa and its kin, token
type ids only where there are several types.

Parameters have the names of the model's own code, in checkpoints and exports.

## Limits

- Adapters, quantised weights, and encoders with `is_decoder=true` are refused.
- Fine-tuning scores of a causal student (`evaluation.tasks`, `tools/glue.py`) are those of
  transformers' heads for it, which read the last token; SQuAD 2.0 needs a tokenizer with a
  `cls_token`. The STS-B probe averages over all tokens.
- Rotary positions of `rope_type` "dynamic" and "longrope" are refused, because they depend on each
  batch.
{limits}
"""
LIMITS = {
    "modernbert": "its first block has no input norm, so a student whose first layer is copied "
    "from another one lacks that layer's norm, and a later layer copied from the first one starts "
    "with a norm of ones",
    "esm": "the mask is read once per forward, for which the host waits; the rotary frequencies of "
    "a sharded teacher are computed, not read from its file; the contact head is not exported",
    "deberta-v2": "the relative embeddings, their norm and the convolution are part of the model; "
    "the relative embeddings train from two blocks on; rows are at most as long as "
    "`max_position_embeddings`, with or without a table of positions",
    "deberta": "the relative embeddings are as in DeBERTa v2; queries and values include their "
    "biases, but not the scale by which the model divides queries; with `train.compile` each block "
    "is compiled in two parts",
    "albert": "all layers are one block, so that `teacher.layer` is a number of passes through it, "
    "and a student has as many passes as `num_layers`, at the same number of parameters; with "
    '`init: "teacher"` its block is cut from the teacher\'s, and `layer_map` is refused; '
    "with `train.compile` all passes are compiled as one graph",
    "nomic_bert": "files in the format of its authors' own code are read as well",
    "qwen2": "transformers reads every tokenizer beside such a model as a `Qwen2Tokenizer`; a "
    "student of a model with another one is not exported",
    "gemma3_text": "text models only, not `gemma3`, which has a vision tower; a student's scale of "
    "scores (`query_pre_attn_scalar`) follows the size of its heads",
    "mpnet": "the relative attention bias is shared by all layers; a student keeps that of its "
    "first heads, and needs two blocks to train it",
}


def page() -> str:
    """Return the page."""
    listed = "\n".join(_row(name, row) for name, row in ARCHITECTURES.items())
    return PAGE.format(
        rows=listed, factors=_factors(ARCHITECTURES), limits=_limits(), defaults=_defaults()
    )


def _row(model_type: str, row: Architecture) -> str:
    projections = ", ".join(f"`{path}`" for path in row.projections)
    if row.fused_biases:
        projections += " with " + ", ".join(f"`{path}`" for path in row.fused_biases.values())
    norm = f", after `{row.input_norm}`" if row.input_norm else ""
    attention = "eager" if row.eager_only else "sdpa, eager"
    if row.windowed:
        attention += "; local and global layers"
    if row.one_window:
        attention += "; local layers"
    if row.causal:
        attention += "; causal"
    documents = "row" if row.no_documents else "row, document"
    return f"| {row.title} | `{model_type}` | {projections}{norm} | {attention} | {documents} |"


def _factors(rows: Mapping[str, Architecture]) -> str:
    others = [f"{row.title}: {row.ffn_factor:g} ×" for row in rows.values() if row.ffn_factor != 4]
    return f"4 × ({', '.join(others)})"


def _defaults() -> str:
    return "; ".join(
        f"{row.title}: " + ", ".join(f"`{key}={value!r}`" for key, value in row.defaults.items())
        for row in ARCHITECTURES.values()
        if row.defaults
    )


def _limits() -> str:
    lines = []
    for model_type, row in ARCHITECTURES.items():
        parts = [
            f"`{key}` must be {' or '.join(f'`{value!r}`' for value in values)}"
            for key, values in row.only.items()
        ]
        if row.no_documents:
            parts.append(f'`data.attention="document"` is refused: {row.no_documents}')
        if model_type in LIMITS:
            parts.append(LIMITS[model_type])
        if parts:
            lines.append(f"- {row.title}: {'; '.join(parts)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
