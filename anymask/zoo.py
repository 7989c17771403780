"""The mask zoo: masks of papers and of other packages, each a few lines in the mask language.

They are Masks like those of masks.py and join with & | ^ ~. Tables that a mask needs (ancestors, places in a document)
are computed once, when it is made, on the device of its tensors and without waiting for it; whoever changes those
tensors in place makes the mask anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anymask.errors import InputError
from anymask.masks import NOBODY, Mask, PerBatch, check_tensor, of_batch, of_token, place_in_document, same_document

# windows, chunks, strides


def chunked(size: int) -> Mask:
    """A query sees the keys of its own chunk of `size` tokens. Combine with causal(), as the local layers of Llama 4 do
    (Meta 2025; attention_chunk in FlashAttention-3).

    The last chunk may be shorter. Chunks count from index 0; shift() moves that, for example for left padding.
    """
    _at_least(1, size=size)
    return Mask(lambda b, h, q_idx, kv_idx: q_idx // size == kv_idx // size, "chunked", size)


def dilated_window(left: int, right: int, dilation: int) -> Mask:
    """Query i sees the keys i - left * dilation ... i + right * dilation in steps of dilation, itself included.

    The dilated window of Longformer (Beltagy et al. 2020, arXiv:2004.05150): left + right + 1 keys, fewer at the ends
    of the sequence. dilation=1 is sliding_window(left, right).
    """
    _at_least(0, left=left, right=right)
    _at_least(1, dilation=dilation)

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        is_near = (q_idx - kv_idx <= left * dilation) & (kv_idx - q_idx <= right * dilation)
        return is_near & (q_idx % dilation == kv_idx % dilation)

    return Mask(sees, "dilated_window", left, right, dilation)


def sink_window(window: int, num_sinks: int = 4) -> Mask:
    """Causal: a query sees the last `window` keys, itself included, and the first num_sinks keys of the sequence, the
    attention sinks of StreamingLLM (Xiao et al. 2023, arXiv:2309.17453).
    """
    _at_least(1, window=window)
    _at_least(0, num_sinks=num_sinks)

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) & ((q_idx - kv_idx < window) | (kv_idx < num_sinks))

    return Mask(sees, "sink_window", window, num_sinks)


def sparse_strided(stride: int) -> Mask:
    """Causal: a query sees the last `stride` keys, itself included, and each stride-th key before it.

    The strided pattern of the Sparse Transformer (Child et al. 2019, arXiv:1904.10509), both its parts in every head.
    """
    _at_least(1, stride=stride)

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) & ((q_idx - kv_idx < stride) | (q_idx % stride == kv_idx % stride))

    return Mask(sees, "sparse_strided", stride)


def sparse_fixed(stride: int, num_summary: int) -> Mask:
    """Causal: a query sees its own block of `stride` tokens and the last num_summary tokens of every block before it.

    The fixed pattern of the Sparse Transformer (Child et al. 2019, arXiv:1904.10509, where they are l and c), both its
    parts in every head.
    """
    _at_least(1, stride=stride)
    _at_least(0, num_summary=num_summary)

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) & ((q_idx // stride == kv_idx // stride) | (kv_idx % stride >= stride - num_summary))

    return Mask(sees, "sparse_fixed", stride, num_summary)


def longformer(window: int, is_global: Tensor) -> Mask:
    """A query sees window // 2 keys on each side and itself; global tokens see all and are seen by all (Beltagy et al.
    2020, arXiv:2004.05150).

    is_global: bool [S] or [B, S].
    """
    _at_least(1, window=window)
    check_tensor("is_global", is_global, "bool", "[S]", "[B, S]")
    reach = window // 2

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        is_near = (q_idx - kv_idx <= reach) & (kv_idx - q_idx <= reach)
        return is_near | of_token(is_global, b, q_idx) | of_token(is_global, b, kv_idx)

    return Mask(sees, "longformer", window, is_global)


def bigbird(random: Tensor, block_size: int, window: int = 3, num_global: int = 1) -> Mask:
    """Window, global and random blocks of block_size tokens (Zaheer et al. 2020, arXiv:2007.14062).

    random: bool [nQ, nKV] or [H, nQ, nKV], True where a query block also sees a key block, with all blocks of the
    sequence, the last one possibly shorter: random_blocks() draws one.
    window: a query block sees window // 2 key blocks on each side and its own.
    num_global: that many first and last blocks see all and are seen by all, as in the authors' code.
    """
    check_tensor("random", random, "bool", "[nQ, nKV]", "[H, nQ, nKV]")
    _at_least(1, block_size=block_size, window=window)
    _at_least(0, num_global=num_global)
    reach, (num_q, num_kv) = window // 2, random.shape[-2:]

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        q, kv = q_idx // block_size, kv_idx // block_size
        is_near = (q - kv <= reach) & (kv - q <= reach)
        is_global = (q < num_global) | (q >= num_q - num_global) | (kv < num_global) | (kv >= num_kv - num_global)
        return is_near | is_global | (random[h, q, kv] if random.dim() == 3 else random[q, kv])

    return Mask(sees, "bigbird", random, block_size, window, num_global)


def random_blocks(
    num_q: int,
    num_kv: int,
    num_random: int,
    heads: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The random blocks of bigbird(): bool [num_q, num_kv], or [heads, num_q, num_kv], num_random True in each row.

    Drawn on the CPU, so that a seed means the same blocks on each device. Blocks that the window or a global block
    covers may be drawn too.
    """
    if not 0 <= num_random <= num_kv:
        raise InputError(f"num_random is from 0 to num_kv={num_kv}, the key blocks there are, got {num_random!r}")
    shape = (num_q, num_kv) if heads is None else (heads, num_q, num_kv)
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).topk(num_random).indices
    return torch.zeros(shape, dtype=torch.bool).scatter_(-1, drawn, True).to(device)


# grids of 1, 2, 3 or more axes


def neighbourhood(
    shape: int | Sequence[int],
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Mask:
    """Neighbourhood attention on a grid of tokens in row-major order (Hassani et al. 2023, arXiv:2204.07143; dilated:
    Hassani and Shi 2022, arXiv:2209.15001; causal axes: Hassani et al. 2024, arXiv:2403.04690). The mask of NATTEN.

    shape: tokens along each axis, (S,), (H, W) or (T, H, W).
    window, dilation, causal: one value for all axes or one for each. Along an axis a query sees `window` keys, itself
    among them: window // 2 before it, the rest after it, in steps of dilation. Near a border the window is shifted
    inwards, so that each query sees as many keys. Along a causal axis it sees itself and the window - 1 keys before it,
    fewer near the start. window * dilation must not exceed the axis.

    Tokens past the grid, text for example, see nothing and nobody sees them: join their mask with |.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    num = len(shape)
    _at_least(1, num_axes=num)
    per_axis = _per_axis("window", window, num), _per_axis("dilation", dilation, num), _per_axis("causal", causal, num)
    axes = tuple(zip(shape, *per_axis, strict=True))
    for length, size, step, _ in axes:
        _at_least(1, shape=length, window=size, dilation=step)
        if size * step > length:
            raise InputError(
                f"window {size} times dilation {step} exceeds an axis of {length} tokens in shape {shape}: "
                f"take at most {length // step}"
            )

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        is_near = q_idx < math.prod(shape)
        for q, kv, axis in zip(_coordinates(q_idx, shape), _coordinates(kv_idx, shape), axes, strict=True):
            is_near = is_near & _is_neighbour(q, kv, *axis)
        return is_near

    return Mask(sees, "neighbourhood", shape, window, dilation, causal)


def _coordinates(index: Any, shape: tuple[int, ...]) -> list[Any]:
    """Row-major coordinates of a token. The first is not wrapped: for a token past the grid it is past its axis."""
    coordinates: list[Any] = []
    for length in shape[:0:-1]:
        coordinates = [index % length, *coordinates]
        index = index // length
    return [index, *coordinates]


def _is_neighbour(q: Any, kv: Any, length: int, window: int, dilation: int, causal: bool) -> Any:
    """Neighbourhood along one axis: a window among the tokens with the query's remainder modulo dilation."""
    q_group, q, kv_group, kv = q % dilation, q // dilation, kv % dilation, kv // dilation
    if causal:
        return (q_group == kv_group) & (q - window < kv) & (kv <= q)
    last_start = (length + dilation - 1 - q_group) // dilation - window
    start = torch.minimum((q - window // 2).clamp(min=0), last_start)
    return (q_group == kv_group) & (start <= kv) & (kv < start + window)


def sliding_tile(shape: Sequence[int], tile: Sequence[int], window: int | Sequence[int]) -> Mask:
    """Sliding tile attention for video (Zhang et al. 2025, arXiv:2502.04507): the queries of a tile see whole tiles,
    those in a window of tiles around their own, shifted inwards at the borders.

    shape: tokens along each axis, (T, H, W).  tile: tokens of a tile along each axis, which must divide shape.
    window: in tiles, one value for all axes or one for each.
    The tokens come tile by tile, tiles and the tokens in a tile in row-major order; with tiles of as many tokens as the
    kernel's blocks, every block is empty or full. Tokens past the grid are as in neighbourhood().
    """
    if len(shape) != len(tile) or any(size < 1 or length % size for length, size in zip(shape, tile, strict=True)):
        raise InputError(f"a tile divides the shape along each axis, got shape {tuple(shape)} and tile {tuple(tile)}")
    near = neighbourhood([length // size for length, size in zip(shape, tile, strict=True)], window).function
    size = math.prod(tile)
    function = lambda b, h, q_idx, kv_idx: near(b, h, q_idx // size, kv_idx // size)
    return Mask(function, "sliding_tile", tuple(shape), tuple(tile), window)


# packed documents, prefixes, trees


def packed_prefix_lm(ids: Tensor, prefix_lens: Tensor) -> Mask:
    """Packed documents, each a prefix LM (Raffel et al. 2020): a query sees the prefix of its document and the keys of
    its document up to itself.

    ids: integers [S] or [B, S] as document() takes them, here from 0 to n - 1, negative for padding; document_ids()
    makes them of cu_seqlens.
    prefix_lens: integers [n] or [B, n], how many tokens of document id its prefix has; 0 makes that document causal.
    """
    check_tensor("ids", ids, "integer", "[S]", "[B, S]")
    check_tensor("prefix_lens", prefix_lens, "integer", "[n]", "[B, n]")
    same, is_prefix = same_document(ids, ids), place_in_document(ids) < _of_document(prefix_lens, ids)

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return same(b, h, q_idx, kv_idx) & ((kv_idx <= q_idx) | of_token(is_prefix, b, kv_idx))

    return Mask(sees, "packed_prefix_lm", ids, prefix_lens)


def packed_sink_window(ids: Tensor, window: int, num_sinks: int = 4) -> Mask:
    """Packed documents, each with a sink_window(): a query sees, in its own document, the last `window` keys, itself
    included, and the first num_sinks ones.

    ids: integers [S] or [B, S] as document() takes them.
    """
    check_tensor("ids", ids, "integer", "[S]", "[B, S]")
    _at_least(1, window=window)
    _at_least(0, num_sinks=num_sinks)
    same, is_sink = same_document(ids, ids), place_in_document(ids) < num_sinks

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        is_shown = (q_idx - kv_idx < window) | of_token(is_sink, b, kv_idx)
        return same(b, h, q_idx, kv_idx) & (kv_idx <= q_idx) & is_shown

    return Mask(sees, "packed_sink_window", ids, window, num_sinks)


def shared_prefix(ids: Tensor, prefix_of: Tensor) -> Mask:
    """Packed documents that share prefixes, as the answers to one prompt do: causal, and a query sees its own document
    and the document that is its prefix.

    ids: integers [S] or [B, S] as document() takes them, here from 0 to n - 1, negative for padding. A prefix comes
    before its continuations.
    prefix_of: integers [n] or [B, n], the document that is the prefix of document id; its own id or a negative number
    where it has none. One prompt with many answers: ids 0 0 0 1 1 2 2 ..., prefix_of 0 0 0 ...
    """
    check_tensor("ids", ids, "integer", "[S]", "[B, S]")
    check_tensor("prefix_of", prefix_of, "integer", "[n]", "[B, n]")
    same, prefix = same_document(ids, ids), _of_document(prefix_of, ids)
    prefix = torch.where((ids < 0) | (prefix < 0), NOBODY, prefix).to(torch.int32)

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        is_prefix = of_token(prefix, b, q_idx) == of_token(ids, b, kv_idx).int()
        return (kv_idx <= q_idx) & (same(b, h, q_idx, kv_idx) | is_prefix)

    return Mask(sees, "shared_prefix", ids, prefix_of)


def tree(parents: Tensor, prefix_len: PerBatch = 0) -> Mask:
    """A token tree to verify, as in speculative decoding (SpecInfer, Miao et al. 2023, arXiv:2305.09781; Medusa, Cai et
    al. 2024, arXiv:2401.10774): a node sees the whole context, its ancestors and itself.

    parents: integers [N] or [B, N], the parent of each node, negative for a root; nodes in any order.
    prefix_len: keys of the context before the tree, a number or a tensor [B]: key prefix_len + j is node j. Query i is
    node i.
    """
    check_tensor("parents", parents, "integer", "[N]", "[B, N]")
    is_above = _ancestors(parents)

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        place = kv_idx - of_batch(prefix_len, b)
        node = place.clamp(min=0)
        return (place < 0) | is_node_above(b, q_idx, node)

    def is_node_above(b: Any, q_idx: Any, node: Any) -> Any:
        return is_above[b, q_idx, node] if is_above.dim() == 3 else is_above[q_idx, node]

    if isinstance(prefix_len, int) and prefix_len == 0:  # read 16 keys at a time
        return Mask(lambda b, h, q_idx, kv_idx: is_node_above(b, q_idx, kv_idx), "tree", parents, prefix_len)

    return Mask(sees, "tree", parents, prefix_len)


def _ancestors(parents: Tensor) -> Tensor:
    """bool [N, N] or [B, N, N]: whether node j is node i or above it. Each round doubles how far up is known."""
    num = parents.shape[-1]
    up = torch.where(parents < 0, num, parents).long()
    up = torch.nn.functional.pad(up, (0, 1), value=num)  # node `num` stands above the roots and above itself
    is_above = torch.eye(num + 1, dtype=torch.bool, device=parents.device).expand(*up.shape, -1)
    for _ in range((num - 1).bit_length()):
        is_above = is_above | is_above.take_along_dim(up[..., None], dim=-2)
        up = up.gather(-1, up)
    return is_above[..., :num, :num].contiguous()


def _of_document(table: Tensor, ids: Tensor) -> Tensor:
    """table[id] for each token; table: [n] or [B, n]. Padding reads entry 0."""
    known = ids.clamp(min=0).long()
    return table[known] if table.dim() == 1 else table.gather(-1, known.expand(table.shape[0], -1))


# diffusion, images in text


def block_diffusion(length: int, block_size: int) -> Mask:
    """The training mask of block diffusion (Arriola et al. 2025, arXiv:2503.09573): 2 * length tokens, first the noised
    sequence x_t, then the clean one x_0, both in blocks of block_size tokens.

    A noised query sees its own noised block and the clean blocks before it; a clean query sees the clean blocks up to
    its own.
    """
    _at_least(1, length=length, block_size=block_size)

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        q_is_clean, kv_is_clean = q_idx >= length, kv_idx >= length
        q_block = torch.where(q_is_clean, q_idx - length, q_idx) // block_size
        kv_block = torch.where(kv_is_clean, kv_idx - length, kv_idx) // block_size
        return ((q_is_clean == kv_is_clean) & (q_block == kv_block)) | (kv_is_clean & (kv_block < q_block))

    return Mask(sees, "block_diffusion", length, block_size)


def bidirectional_spans(ids: Tensor) -> Mask:
    """Causal, but the tokens of one span see each other both ways: images inside text (Gemma 3, arXiv:2503.19786).

    ids: integers [S] or [B, S], the span of each token, negative for text, which is causal. A layer with a window is
    sliding_window(left, 0) | document(ids); where the images come first, as in PaliGemma, prefix_lm() says it.
    """
    check_tensor("ids", ids, "integer", "[S]", "[B, S]")
    same = same_document(ids, ids)
    return Mask(lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | same(b, h, q_idx, kv_idx), "bidirectional_spans", ids)


def flamingo(is_image: Tensor, tokens_per_image: int) -> Mask:
    """Cross-attention from text to the images in it: a text token sees the image immediately before it (Alayrac et al.
    2022, arXiv:2204.14198).

    is_image: bool [Sq] or [B, Sq], True at the text tokens that stand for an image, which see that image themselves.
    tokens_per_image: keys of each image; the keys are the images in order. Text before the first image sees nothing.
    """
    check_tensor("is_image", is_image, "bool", "[Sq]", "[B, Sq]")
    _at_least(1, tokens_per_image=tokens_per_image)
    image = (is_image.cumsum(-1) - 1).to(torch.int32)

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return of_token(image, b, q_idx) == kv_idx // tokens_per_image

    return Mask(sees, "flamingo", is_image, tokens_per_image)


# the mask formats of other packages


def flashmask(startend_row_indices: Tensor, causal: bool = False, offset: PerBatch = 0) -> Mask:
    """FlashMask's intervals of hidden rows for each key (Wang et al. 2024, arXiv:2410.01359).

    startend_row_indices: integers [B or 1, H or 1, Skv, n], bounds of rows, an interval being [start, end). H are query
    heads; a tensor for key/value heads becomes one by repeat_interleave(Hq // Hkv, dim=1).
      causal, n = 1: start; the rows from there on are hidden.  n = 2: start, end.
      not causal, n = 2: start of one and end of another; the rows from start on and those before end are hidden.
      n = 4: start, end of one and start, end of another.
    The two are meant for the lower left and the upper right triangle, but hide their rows on either side.
    causal: also hide the keys after i + offset, as causal(offset) does. FlashMask aligns the diagonal bottom-right:
    offset = Skv - Sq.
    """
    check_tensor("startend_row_indices", startend_row_indices, "integer", "[B, H, Skv, n]")
    B, H, _, n = startend_row_indices.shape
    if n not in ((1, 2) if causal else (2, 4)):
        expected = "1 or 2 with causal=True" if causal else "2 or 4 with causal=False"
        raise InputError(f"startend_row_indices holds {expected} bounds for each key, got {n}")

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        bounds = startend_row_indices[0 if B == 1 else b, 0 if H == 1 else h, kv_idx]
        if causal:
            is_shown = q_idx < bounds[0] if n == 1 else (q_idx < bounds[0]) | (q_idx >= bounds[1])
            return is_shown & (kv_idx <= q_idx + of_batch(offset, b))
        if n == 2:
            return (q_idx < bounds[0]) & (q_idx >= bounds[1])
        return ((q_idx < bounds[0]) | (q_idx >= bounds[1])) & ((q_idx < bounds[2]) | (q_idx >= bounds[3]))

    return Mask(sees, "flashmask", startend_row_indices, causal, offset)


def slices(q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor | None = None) -> Mask:
    """MagiAttention's slices (Tao and Huang 2025, github.com/SandAI-org/MagiAttention): a query sees a key where any
    slice shows it.

    q_ranges, k_ranges: integers [n, 2], the queries and keys of a slice, [start, end).
    attn_type_map: integers [n]: 0 full; 1 causal, aligned at the slice's last query and key (bottom-right); 2 inverse
    causal, a query sees the keys from the diagonal on, aligned at the first ones (top-left); 3 both. None: all full.

    Each slice adds its test to the mask: meant for tens of slices, not thousands.
    """
    check_tensor("q_ranges", q_ranges, "integer", "[n, 2]")
    check_tensor("k_ranges", k_ranges, "integer", "[n, 2]")
    types = torch.zeros_like(q_ranges[:, 0]) if attn_type_map is None else attn_type_map
    check_tensor("attn_type_map", types, "integer", "[n]")
    if not q_ranges.shape == k_ranges.shape == (len(types), 2):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q_ranges, k_ranges, types))
        raise InputError(f"slices() takes q_ranges [n, 2], k_ranges [n, 2] and attn_type_map [n], got {shapes}")

    def sees(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        is_seen, i = torch.zeros_like(b, dtype=torch.bool), torch.zeros_like(b)
        for _ in range(len(types)):
            (q_start, q_end), (k_start, k_end) = ((x[i, 0], x[i, 1]) for x in (q_ranges, k_ranges))
            k_start = k_start + torch.where(types[i] >= 2, q_idx - q_start, 0)
            k_end = k_end - torch.where(types[i] % 2 == 1, q_end - 1 - q_idx, 0)
            is_seen = is_seen | ((q_start <= q_idx) & (q_idx < q_end) & (k_start <= kv_idx) & (kv_idx < k_end))
            i = i + 1  # the slice as a traced constant: a Python index would be one more number to pass to a kernel
        return is_seen

    return Mask(sees, "slices", q_ranges, k_ranges, attn_type_map)


def _at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < least:
            raise InputError(f"{name} is an integer of at least {least}, got {number!r}")


def _per_axis(name: str, value: Any, num: int) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * num
    if len(values) != num:
        raise InputError(f"{name} is one value or one for each of the {num} axes of shape, got {value!r}")
    return values
