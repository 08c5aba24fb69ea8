"""The relation loss as two Triton kernels, forward and backward.

Inputs: Q, K and V in place, the tokens' keys and shares. Outputs: partial losses and every row's
two softmax normalisers (forward), the student's gradients (backward). A T×T map exists only as
tiles in registers. Not handled here: launching (`relations.triton`).

Forward makes one pass over the columns. It keeps the running maximum and sum of the teacher's and
of the student's row, and the running Σ p (t − s), rescaled with the teacher's maximum; KL = that /
Σ − lse_t + lse_s.

In backward a program owns a tile of tokens of one letter x and meets the tokens of every letter o
that a pair joins with x. One tile of scores x_i·o_j serves both pairs: xo, in which x_i is the row
(normaliser lse_i), and ox, in which it is the column (normaliser lse_j). So xx, qk alone, and qk
with kq are one pass each, and nothing needs atomics: the gradient is Σ_o Σ_j [(S − P)^xo_ij + (S −
P)^ox_ji] o_j.

On an H100 or H200 at E = 6 or 16, 2^x limits both kernels: a multiprocessor computes 16 per clock,
against 128 other float operations and 1024 multiply-adds of bf16. So scores are in units of
log2(e), and backward takes one 2^x per score and model instead of two: 2^(s − lse_i) + 2^(s −
lse_j) = 2^(s − c) · (2^(c − lse_i) + 2^(c − lse_j)). That is equally exact while all normalisers of
a head are within `_REACH` of c; for other heads both powers are computed.

Legend: B sequences, T tokens, R relation heads, E width per relation head (padded to a power of
two), P pairs, G tiles of a sequence, M tokens of the tile that a program owns, N of a tile that it
meets; t, s scores of teacher and student.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

NO_PAIR = 15
_NO_PAIR = tl.constexpr(NO_PAIR)
_LN2 = tl.constexpr(0.6931471805599453)
# The score of a hidden token: finite, so that the difference of two is 0 and not NaN.
_HIDDEN = tl.constexpr(-1e30)
# In log2: factors stay within 2^±60 and products within 2^120; only values below 2^-66 underflow.
_REACH = tl.constexpr(60.0)


class Model(NamedTuple):
    """One model's tensors q, k and v, `[B, T, D]`; `scale` is log2(e) / √E.

    A letter that no pair uses has another letter's tensor.
    """

    tensors: tuple[Any, ...]
    strides_B: tuple[int, ...]
    strides_T: tuple[int, ...]
    scale: float


class Tokens(NamedTuple):
    """Which tokens attend to each other.

    The shares are floating, all else is int32, and None if every token attends to its whole row.
    Keys are equal among tokens that attend to each other, and -1 on padding. A tile has a common
    key if all its tokens have that key, else -1. It meets the tiles from `first_BG` up to, but
    without, `end_BG`.
    """

    share_BT: Any
    keys_BT: Any
    common_BG: Any
    first_BG: Any
    end_BG: Any


@triton.jit
def relation_forward(
    teacher: Model,
    student: Model,
    tokens: Tokens,
    loss_PG: tl.tensor,  # out: one partial sum per program
    lse_2PBRT: tl.tensor,  # out: the teacher's and the student's, in log2; 0 on padding
    pair_codes: tl.tensor,  # a nibble per pair: 3 · first letter + second
    B: tl.tensor,
    T: tl.tensor,
    R: tl.tensor,
    TEACHER_E: tl.constexpr,
    STUDENT_E: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """Compute the losses of all pairs and the normalisers of their rows.

    The grid is (tiles · R · B, P).
    """
    tile, head, sequence = _locate(T, R, BLOCK)
    pair = tl.program_id(1)
    code = _nibble(pair_codes, pair)
    a, b = code // 3, code % 3
    rows_M = tile * BLOCK + tl.arange(0, BLOCK)
    keys_M = _load_keys(tokens, sequence, rows_M, T)
    ta, ta_stride = _head(teacher, a, sequence, head, TEACHER_E)
    sa, sa_stride = _head(student, a, sequence, head, STUDENT_E)
    tb, tb_stride = _head(teacher, b, sequence, head, TEACHER_E)
    sb, sb_stride = _head(student, b, sequence, head, STUDENT_E)
    ta_ME = _load_tile(ta, ta_stride, tile, keys_M, TEACHER_E, BLOCK)
    sa_ME = _load_tile(sa, sa_stride, tile, keys_M, STUDENT_E, BLOCK)
    first, end = _tiles_to_meet(tokens, sequence, tile, T, BLOCK)
    if CAUSAL:
        end = tl.minimum(end, tile + 1)

    # The softmaxes of both models are summed tile by tile, relative to the largest score so far
    # (online softmax); `difference` is Σ p (t − s), where p belongs to the teacher's sum.
    max_t_M = tl.full([BLOCK], _HIDDEN, tl.float32)
    max_s_M = tl.full([BLOCK], _HIDDEN, tl.float32)
    sum_t_M = tl.full([BLOCK], 0.0, tl.float32)
    sum_s_M = tl.full([BLOCK], 0.0, tl.float32)
    difference_M = tl.full([BLOCK], 0.0, tl.float32)
    for other in range(first, end):
        columns_N = other * BLOCK + tl.arange(0, BLOCK)
        keys_N = _load_keys(tokens, sequence, columns_N, T)
        tb_NE = _load_tile(tb, tb_stride, other, keys_N, TEACHER_E, BLOCK)
        sb_NE = _load_tile(sb, sb_stride, other, keys_N, STUDENT_E, BLOCK)
        t_MN = tl.dot(ta_ME, tl.trans(tb_NE), input_precision="ieee")
        s_MN = tl.dot(sa_ME, tl.trans(sb_NE), input_precision="ieee")

        # Masking costs time, and most tiles have nothing to hide.
        some_hidden = _may_hide(tokens, sequence, tile, other, T, BLOCK)
        if CAUSAL:
            some_hidden = some_hidden | (other == tile)
        if some_hidden:
            visible_MN = (keys_M[:, None] == keys_N[None, :]) & (keys_N >= 0)[None, :]
            if CAUSAL:
                visible_MN = visible_MN & (columns_N[None, :] <= rows_M[:, None])
            t_MN = tl.where(visible_MN, t_MN, _HIDDEN)
            s_MN = tl.where(visible_MN, s_MN, _HIDDEN)

        # What was summed before is rescaled to the new largest score.
        new_max_t_M = tl.maximum(max_t_M, tl.max(t_MN, 1) * teacher.scale)
        new_max_s_M = tl.maximum(max_s_M, tl.max(s_MN, 1) * student.scale)
        p_MN = tl.exp2(t_MN * teacher.scale - new_max_t_M[:, None])
        exp_s_MN = tl.exp2(s_MN * student.scale - new_max_s_M[:, None])

        rescale_t_M = tl.exp2(max_t_M - new_max_t_M)
        rescale_s_M = tl.exp2(max_s_M - new_max_s_M)
        sum_t_M = sum_t_M * rescale_t_M + tl.sum(p_MN, 1)
        sum_s_M = sum_s_M * rescale_s_M + tl.sum(exp_s_MN, 1)
        difference_M = difference_M * rescale_t_M + tl.sum(
            p_MN * (t_MN * teacher.scale - s_MN * student.scale), 1
        )
        max_t_M = new_max_t_M
        max_s_M = new_max_s_M

    real_M = keys_M >= 0
    sum_t_M = tl.where(real_M, sum_t_M, 1.0)  # it is 0 if no tile was met
    sum_s_M = tl.where(real_M, sum_s_M, 1.0)
    lse_t_M = max_t_M + tl.log2(sum_t_M)
    lse_s_M = max_s_M + tl.log2(sum_s_M)
    # KL(p ‖ q) = Σ p (t − s) − lse_t + lse_s, in bits until it is multiplied by ln 2.
    share_M = tl.load(tokens.share_BT + sequence * T + rows_M, mask=real_M, other=0.0)
    kl_M = tl.where(real_M, difference_M / sum_t_M - lse_t_M + lse_s_M, 0.0)
    loss = tl.sum(kl_M * share_M, 0) * (_LN2 / R)
    tl.store(loss_PG + pair * tl.num_programs(0) + tl.program_id(0), loss)

    # The backward recomputes the scores and needs the normalisers only.
    P = tl.num_programs(1)
    lse_t = lse_2PBRT + _index(0, pair, P, sequence, B, head, R) * T
    lse_s = lse_2PBRT + _index(1, pair, P, sequence, B, head, R) * T
    tl.store(lse_t + rows_M, tl.where(real_M, lse_t_M, 0.0), mask=rows_M < T)
    tl.store(lse_s + rows_M, tl.where(real_M, lse_s_M, 0.0), mask=rows_M < T)


@triton.jit
def relation_backward(
    teacher: Model,
    student: Model,
    tokens: Tokens,
    lse_2PBRT: tl.tensor,
    factor_2PBRT: tl.tensor,  # 2^(centre − lse)
    centre_2PBR: tl.tensor,
    reach_2PBR: tl.tensor,  # the largest distance of lse from the centre
    weights_P: tl.tensor,  # relative to the largest
    grad_total: tl.tensor,
    grads: Model,  # out: of the student's tensors, in their dtype
    letter_codes: tl.tensor,  # a nibble per letter that gets a gradient
    # Nibble number 3 · first letter + second holds the number of that pair, or NO_PAIR.
    pair_numbers: tl.tensor,
    P: tl.tensor,
    B: tl.tensor,
    T: tl.tensor,
    R: tl.tensor,
    TEACHER_E: tl.constexpr,
    STUDENT_E: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOOST: tl.constexpr,  # scales S − P of fp16 out of the subnormals; `grads.scale` undoes it
) -> None:
    """Compute the gradients of the student's tensors.

    The grid is (tiles · R · B, letters that get a gradient).
    """
    tile, head, sequence = _locate(T, R, BLOCK)
    x = _nibble(letter_codes, tl.program_id(1))
    positions_M = tile * BLOCK + tl.arange(0, BLOCK)
    keys_M = _load_keys(tokens, sequence, positions_M, T)
    tx, tx_stride = _head(teacher, x, sequence, head, TEACHER_E)
    sx, sx_stride = _head(student, x, sequence, head, STUDENT_E)
    tx_ME = _load_tile(tx, tx_stride, tile, keys_M, TEACHER_E, BLOCK)
    sx_ME = _load_tile(sx, sx_stride, tile, keys_M, STUDENT_E, BLOCK)
    grad_ME = tl.full(sx_ME.shape, 0.0, tl.float32)

    # The letter x gets a gradient from the pairs "xo", where this tile's tokens are rows, and "ox",
    # where they are columns; both need the same scores, which are computed once.
    for o in range(3):
        xo = _nibble(pair_numbers, 3 * x + o)
        ox = _nibble(pair_numbers, 3 * o + x)
        as_rows, as_columns = xo != _NO_PAIR, ox != _NO_PAIR

        first, end = _tiles_to_meet(tokens, sequence, tile, T, BLOCK)
        if CAUSAL:
            end = tl.where(as_columns, end, tl.minimum(end, tile + 1))
            first = tl.where(as_rows, first, tl.maximum(first, tile))
        end = tl.where(as_rows | as_columns, end, first)

        # A pair that is not requested uses the other's normalisers, with weight 0.
        row_pair = tl.where(as_rows, xo, tl.where(as_columns, ox, 0))
        column_pair = tl.where(as_columns, ox, row_pair)
        row_weight = tl.where(as_rows, tl.load(weights_P + row_pair) * BOOST, 0.0)
        column_weight = tl.where(as_columns, tl.load(weights_P + column_pair) * BOOST, 0.0)
        row_t = _index(0, row_pair, P, sequence, B, head, R)
        row_s = _index(1, row_pair, P, sequence, B, head, R)
        column_t = _index(0, column_pair, P, sequence, B, head, R)
        column_s = _index(1, column_pair, P, sequence, B, head, R)

        # Where all normalisers are near a centre c, 2^(s − lse) is 2^(s − c) · 2^(c − lse): one
        # exponential for a score as row and as column, and factors that were computed once.
        centre_t, shift_t, near_t = _centre(centre_2PBR, reach_2PBR, row_t, column_t)
        centre_s, shift_s, near_s = _centre(centre_2PBR, reach_2PBR, row_s, column_s)
        near = near_t & near_s
        inside_M = positions_M < T
        factor_t_M = row_weight * tl.load(
            factor_2PBRT + row_t * T + positions_M, mask=inside_M, other=0.0
        )
        factor_s_M = row_weight * tl.load(
            factor_2PBRT + row_s * T + positions_M, mask=inside_M, other=0.0
        )
        to, to_stride = _head(teacher, o, sequence, head, TEACHER_E)
        so, so_stride = _head(student, o, sequence, head, STUDENT_E)

        for other in range(first, end):
            positions_N = other * BLOCK + tl.arange(0, BLOCK)
            keys_N = _load_keys(tokens, sequence, positions_N, T)
            to_NE = _load_tile(to, to_stride, other, keys_N, TEACHER_E, BLOCK)
            so_NE = _load_tile(so, so_stride, other, keys_N, STUDENT_E, BLOCK)
            t_MN = tl.dot(tx_ME, tl.trans(to_NE), input_precision="ieee")
            s_MN = tl.dot(sx_ME, tl.trans(so_NE), input_precision="ieee")
            if _may_hide(tokens, sequence, tile, other, T, BLOCK):
                visible_MN = (keys_M[:, None] == keys_N[None, :]) & (keys_N >= 0)[None, :]
                t_MN = tl.where(visible_MN, t_MN, _HIDDEN)
                s_MN = tl.where(visible_MN, s_MN, _HIDDEN)

            # The gradient of a score is the student's probability minus the teacher's.
            if near:
                factor_t_N = tl.load(
                    factor_2PBRT + column_t * T + positions_N, mask=positions_N < T, other=0.0
                )
                factor_s_N = tl.load(
                    factor_2PBRT + column_s * T + positions_N, mask=positions_N < T, other=0.0
                )

                row_factor_t, row_factor_s = factor_t_M[:, None], factor_s_M[:, None]
                column_factor_t = column_weight * shift_t * factor_t_N[None, :]
                column_factor_s = column_weight * shift_s * factor_s_N[None, :]
                if CAUSAL:
                    row_factor_t = tl.where(
                        positions_N[None, :] <= positions_M[:, None], row_factor_t, 0.0
                    )
                    row_factor_s = tl.where(
                        positions_N[None, :] <= positions_M[:, None], row_factor_s, 0.0
                    )
                    column_factor_t = tl.where(
                        positions_N[None, :] >= positions_M[:, None], column_factor_t, 0.0
                    )
                    column_factor_s = tl.where(
                        positions_N[None, :] >= positions_M[:, None], column_factor_s, 0.0
                    )

                t_MN = t_MN * teacher.scale - centre_t
                s_MN = s_MN * student.scale - centre_s
                # A score that is hidden in both directions may be very large: 0 · ∞ would be NaN.
                if CAUSAL:
                    t_MN = _at_most(t_MN, 2 * _REACH)
                    s_MN = _at_most(s_MN, 2 * _REACH)
                t_MN = tl.exp2(t_MN) * (row_factor_t + column_factor_t)
                s_MN = tl.exp2(s_MN) * (row_factor_s + column_factor_s)
                gradient_MN = s_MN - t_MN
            else:
                # A pair that is not requested has the other's normalisers, which its scores may far
                # exceed. A normaliser of +1e30 makes its exponentials 0.
                wanted_M = positions_M < tl.where(as_rows, T, 0)
                wanted_N = positions_N < tl.where(as_columns, T, 0)
                lse_t_M = tl.load(
                    lse_2PBRT + row_t * T + positions_M, mask=wanted_M, other=-_HIDDEN
                )
                lse_s_M = tl.load(
                    lse_2PBRT + row_s * T + positions_M, mask=wanted_M, other=-_HIDDEN
                )
                lse_t_N = tl.load(
                    lse_2PBRT + column_t * T + positions_N, mask=wanted_N, other=-_HIDDEN
                )
                lse_s_N = tl.load(
                    lse_2PBRT + column_s * T + positions_N, mask=wanted_N, other=-_HIDDEN
                )

                t_MN *= teacher.scale
                s_MN *= student.scale
                rows_MN = tl.exp2(s_MN - lse_s_M[:, None]) - tl.exp2(t_MN - lse_t_M[:, None])
                columns_MN = tl.exp2(s_MN - lse_s_N[None, :]) - tl.exp2(t_MN - lse_t_N[None, :])
                if CAUSAL:
                    rows_MN = tl.where(positions_N[None, :] <= positions_M[:, None], rows_MN, 0.0)
                    columns_MN = tl.where(
                        positions_N[None, :] >= positions_M[:, None], columns_MN, 0.0
                    )
                gradient_MN = row_weight * rows_MN + column_weight * columns_MN
            grad_ME = tl.dot(gradient_MN.to(so_NE.dtype), so_NE, grad_ME, input_precision="ieee")

    real_M = keys_M >= 0
    share_M = tl.load(tokens.share_BT + sequence * T + positions_M, mask=real_M, other=0.0)
    factor_M = share_M * (tl.load(grad_total).to(tl.float32) * grads.scale)
    grad_ME = tl.where(real_M[:, None], grad_ME * factor_M[:, None], 0.0)
    grad, grad_stride = _head(grads, x, sequence, head, STUDENT_E)
    columns_E = tl.arange(0, grad_ME.shape[1])
    offsets_ME = positions_M.to(tl.int64)[:, None] * grad_stride + columns_E[None, :]
    inside_ME = (positions_M < T)[:, None] & (columns_E < STUDENT_E)[None, :]
    tl.store(grad + offsets_ME, grad_ME.to(grad.dtype.element_ty), mask=inside_ME)


@triton.jit
def _locate(T: tl.tensor, R: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return a program's tile, head and sequence.

    Tiles of one head are adjacent, because they share its columns in cache.
    """
    tiles = tl.cdiv(T, BLOCK)
    program = tl.program_id(0)
    return program % tiles, program // tiles % R, program // (tiles * R)


@triton.jit
def _index(
    model: tl.constexpr,
    pair: tl.tensor,
    P: tl.tensor,
    sequence: tl.tensor,
    B: tl.tensor,
    head: tl.tensor,
    R: tl.tensor,
) -> tl.tensor:
    """Return the index of an entry in `[2, P, B, R]`."""
    return (((model * P + pair) * B + sequence) * R + head).to(tl.int64)


@triton.jit
def _centre(centre: tl.tensor, reach: tl.tensor, row: tl.tensor, column: tl.tensor) -> tl.tensor:
    """Return the rows' centre, the correction of the columns' factors, and if both are exact."""
    apart = tl.load(centre + row) - tl.load(centre + column)
    near = (tl.load(reach + row) <= _REACH) & (tl.load(reach + column) + tl.abs(apart) <= _REACH)
    return tl.load(centre + row), tl.exp2(apart), near


@triton.jit
def _at_most(exponent: tl.tensor, bound: tl.constexpr) -> tl.tensor:
    """Return the exponent limited to `bound`; unlike `minimum`, this keeps NaN."""
    return tl.where(exponent > bound, bound, exponent)


@triton.jit
def _nibble(codes: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Return the nibble at `index`, the lowest first."""
    return ((tl.cast(codes, tl.int64) >> (4 * index)) & 15).to(tl.int32)


@triton.jit
def _pick(of_letters: tl.tensor, letter: tl.tensor) -> tl.tensor:
    """Return the entry of a letter from a tuple for q, k and v."""
    return tl.where(letter == 0, of_letters[0], tl.where(letter == 1, of_letters[1], of_letters[2]))


@triton.jit
def _head(
    model: Model, letter: tl.tensor, sequence: tl.tensor, head: tl.tensor, E: tl.constexpr
) -> tl.tensor:
    """Return a pointer to a head of a sequence's first token, and the stride between tokens."""
    start = sequence * _pick(model.strides_B, letter).to(tl.int64) + head * E
    return _pick(model.tensors, letter) + start, _pick(model.strides_T, letter)


@triton.jit
def _load_tile(
    head: tl.tensor,
    stride: tl.tensor,
    tile: tl.tensor,
    keys: tl.tensor,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Load a head of a tile's tokens, `[BLOCK, padded E]`; padding gives zeros."""
    PADDED_E: tl.constexpr = max(16, triton.next_power_of_2(E))
    columns = tl.arange(0, PADDED_E)
    offsets = tl.arange(0, BLOCK)[:, None] * stride + columns[None, :]
    mask = (keys >= 0)[:, None] & (columns < E)[None, :]
    return tl.load(head + tile * stride.to(tl.int64) * BLOCK + offsets, mask=mask, other=0.0)


@triton.jit
def _load_keys(
    tokens: Tokens, sequence: tl.tensor, positions: tl.tensor, T: tl.tensor
) -> tl.tensor:
    """Load the tokens' keys, -1 past the end."""
    keys = tl.where(positions < T, 0, -1)
    if tokens.keys_BT is not None:
        keys = tl.load(tokens.keys_BT + sequence * T + positions, mask=positions < T, other=-1)
    return keys


@triton.jit
def _tiles_to_meet(
    tokens: Tokens, sequence: tl.tensor, tile: tl.tensor, T: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return the first and the last + 1 tile that this tile's tokens may attend to."""
    first, end = 0, tl.cdiv(T, BLOCK)
    if tokens.keys_BT is not None:
        at = sequence * end + tile
        first, end = tl.load(tokens.first_BG + at), tl.load(tokens.end_BG + at)
    return first, end


@triton.jit
def _may_hide(
    tokens: Tokens,
    sequence: tl.tensor,
    tile: tl.tensor,
    other: tl.tensor,
    T: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return whether some token of a tile may not attend to some token of another."""
    may_hide = (other + 1) * BLOCK > T
    if tokens.keys_BT is not None:
        common = tokens.common_BG + sequence * tl.cdiv(T, BLOCK)
        key = tl.load(common + tile)
        may_hide = (key < 0) | (key != tl.load(common + other))
    return may_hide
