"""The MoE layer: one routed and one shared expert per token."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.ops import backend, checks
from llama4_kernels.ops.types import Linear, MoEWeights, Quantized, Routing, new_hidden, scale_of, values_of


def moe_gate_up(x: Tensor | Quantized, routing: Routing, weights: MoEWeights) -> tuple[Tensor | Quantized, Tensor | Quantized]:
    """The first half of the MoE layer: gate and up projections of both experts, and SwiGLU.

    For the token t = routing.order[m] at sorted position m, with s = routing.scores[t] and its expert e:
        shared[m] = silu(x[t] · gateᵀ) * (x[t] · upᵀ)                 with gate and up of weights.shared_w13
        routed[m] = silu(s · (x[t] · gate_eᵀ)) * (s · (x[t] · up_eᵀ))      with gate_e and up_e of weights.w13[e]
    which is `Llama4TextExperts` on s · x (Hugging Face transformers, modeling_llama4.py), without rounding s · x.

    All tensors are contiguous.

    x: [T, H] bfloat16 or float32, in token order. Where both w13 weights are fp8 without input_scale it may be Quantized, one scale per
        token or per 128 columns of a token. An unquantised x is quantised here for an fp8 weight: per row and 128 columns where the
        weight has block scales, else per token; with input_scale where that is given, and then for the routed expert s · x is.
    routing: from route_top1. weights: the layer's; the two experts may differ in dtype and in intermediate size.
    Returns (shared [T, I_shared], routed [T, I]), both in sorted order and in the form that moe_down takes: Quantized where that path's
    w2 is fp8, with scale [] = w2.input_scale where that is given, else one per row and 128 columns; otherwise a Tensor of x's dtype,
    bfloat16 where x is Quantized.
    Raises TypeError or ValueError for a wrong dtype, shape, device or layout, and on the CPU (on a GPU with LLAMA4_KERNELS_CHECK_VALUES=1)
    for a routing whose parts do not agree and for scales out of range; BackendError where a backend is asked for that cannot compute it;
    RuntimeError in a backward pass.

    >>> import torch
    >>> from llama4_kernels import ops
    >>> x, eye = torch.tensor([[1.0, 2.0]]), torch.eye(2)
    >>> w13 = torch.cat([eye, eye])  # gate = up = x
    >>> weights = ops.MoEWeights(eye, ops.Linear(w13.expand(2, 4, 2).contiguous()), ops.Linear(eye.expand(2, 2, 2).contiguous()),
    ...                          ops.Linear(w13), ops.Linear(eye))
    >>> routing, _ = ops.route_top1(x, weights.router)
    >>> shared, routed = ops.moe_gate_up(x, routing, weights)
    >>> shared
    tensor([[0.7311, 3.5232]])
    >>> routed
    tensor([[0.5485, 2.6483]])
    """
    op = "moe_gate_up"
    values = checks.activations(op, "x", x, shape=("T", "H"))
    _check_weights(op, weights, values.shape[1], values.device)
    checks.routing(op, routing, tokens=len(values), experts=len(weights.router), device=values.device)
    if isinstance(x, Quantized):
        _check_quantized_input(op, x, weights)
    tensors = torch.ops.llama4_kernels.moe_gate_up(values, scale_of(x), _flat_routing(routing), _flat_weights(weights))
    shared, tensors = _take(tensors, weights.shared_w2)
    routed, _ = _take(tensors, weights.w2)
    return shared, routed


def moe_down(
    shared: Tensor | Quantized,
    routed: Tensor | Quantized,
    routing: Routing,
    weights: MoEWeights,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The second half of the MoE layer: the down projections of both experts, in one sum.

    y[t] = shared[m] · shared_w2ᵀ + routed[m] · w2[e]ᵀ for the token t = routing.order[m] at sorted position m, with its expert e.

    All tensors are contiguous.

    shared: [T, I_shared], routed: [T, I], in sorted order, as moe_gate_up returns them: Quantized where that path's w2 is fp8.
    routing: the one that moe_gate_up was given. weights: the layer's, of which w2 and shared_w2 are multiplied and the others checked.
    out_dtype: bfloat16 or float32, or None for the dtype of the hidden activations that are not Quantized (bfloat16 where both are).
    Returns y [T, H] in token order. Both products are added in fp32 and rounded once. A NaN or infinity in w2[e] reaches the tokens of
    expert e, and with Triton those of other experts too, where they stand near them in sorted order.
    Raises TypeError or ValueError for a wrong dtype, shape, device or layout, and on the CPU (on a GPU with LLAMA4_KERNELS_CHECK_VALUES=1)
    for a routing whose parts do not agree and for scales out of range; BackendError where a backend is asked for that cannot compute it;
    RuntimeError in a backward pass.

    >>> import torch
    >>> from llama4_kernels import ops
    >>> eye = torch.eye(2)
    >>> weights = ops.MoEWeights(eye, ops.Linear(torch.ones(2, 4, 2)), ops.Linear(torch.stack([eye, 10 * eye])),
    ...                          ops.Linear(torch.ones(4, 2)), ops.Linear(eye))
    >>> routing, _ = ops.route_top1(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), weights.router)  # token 1 comes first: expert 0
    >>> ops.moe_down(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2), routing, weights)
    tensor([[13., 14.],
            [ 2.,  3.]])
    """
    op = "moe_down"
    device = checks.activations(op, "shared", shared, shape=("T", "I_shared")).device
    _check_weights(op, weights, "H", device)
    tokens = len(values_of(shared))
    checks.activations(op, "shared", shared, shape=(tokens, weights.shared_w2.weight.shape[1]))
    checks.activations(op, "routed", routed, shape=(tokens, weights.w2.weight.shape[2]), device=device)
    _check_hidden(op, "shared", shared, "shared_w2", weights.shared_w2)
    _check_hidden(op, "routed", routed, "w2", weights.w2)
    checks.routing(op, routing, tokens=tokens, experts=len(weights.router), device=device)
    if out_dtype is None:
        dtypes = {hidden.dtype for hidden in (shared, routed) if isinstance(hidden, Tensor)} or {torch.bfloat16}
        if len(dtypes) > 1:
            raise TypeError(f"{op}: routed has dtype {routed.dtype}, needs that of shared, {shared.dtype}, unless out_dtype is given")
        (out_dtype,) = dtypes
    if out_dtype not in checks.FLOATS:
        raise TypeError(f"{op}: out_dtype is {out_dtype}, needs torch.bfloat16 or torch.float32")
    return torch.ops.llama4_kernels.moe_down(
        values_of(shared), scale_of(shared), values_of(routed), scale_of(routed), _flat_routing(routing), _flat_weights(weights), out_dtype
    )


def fused_moe(x: Tensor, weights: MoEWeights) -> Tensor:
    """The MoE layer: y = shared expert(x) + routed expert(s · x), the expert and its score s from route_top1(x, weights.router).

    `Llama4TextMoe` of Hugging Face transformers (modeling_llama4.py) with top_k = 1; route_top1, moe_gate_up and moe_down in one.

    All tensors are contiguous.

    x: [T, H] bfloat16 or float32. weights: the layer's, whose intermediate sizes are those of this tensor-parallel rank.
    Returns y [T, H] in x's dtype: this rank's part, before the all-reduce. A NaN or infinity in w2[e] reaches the tokens of expert e, and
    with Triton tokens of other experts too: see moe_down.
    Raises TypeError or ValueError for a wrong dtype, shape, device or layout, and on the CPU (on a GPU with LLAMA4_KERNELS_CHECK_VALUES=1)
    for scales out of range; BackendError where a backend is asked for that cannot compute it; RuntimeError in a backward pass.

    >>> import torch
    >>> from llama4_kernels import ops
    >>> x, eye = torch.tensor([[1.0, 2.0]]), torch.eye(2)
    >>> w13 = torch.cat([eye, eye])
    >>> weights = ops.MoEWeights(eye, ops.Linear(w13.expand(2, 4, 2).contiguous()), ops.Linear(eye.expand(2, 2, 2).contiguous()),
    ...                          ops.Linear(w13), ops.Linear(eye))
    >>> ops.fused_moe(x, weights)
    tensor([[1.2795, 6.1715]])
    """
    checks.tensor("fused_moe", "x", x, dtype=checks.FLOATS, shape=("T", "H"))
    _check_weights("fused_moe", weights, x.shape[1], x.device)
    return torch.ops.llama4_kernels.fused_moe(x, _flat_weights(weights))


@torch.library.custom_op("llama4_kernels::moe_gate_up", mutates_args=())
def _moe_gate_up(x: Tensor, x_scale: Tensor | None, routing: list[Tensor], weights: list[Tensor | None]) -> list[Tensor]:
    layer = _weights(weights)
    if checks.values_wanted(x.device):
        checks.routing_values("moe_gate_up", Routing(*routing))
        checks.scale_values("moe_gate_up", "x.scale", x_scale, finite=False)
        _check_weight_values("moe_gate_up", layer)
    hidden = backend.call("moe_gate_up", x.device, _join(x, x_scale), Routing(*routing), layer)
    return [tensor for path, down in zip(hidden, (layer.shared_w2, layer.w2)) for tensor in _give(path, down)]


@_moe_gate_up.register_fake
def _(x: Tensor, x_scale: Tensor | None, routing: list[Tensor], weights: list[Tensor | None]) -> list[Tensor]:
    layer = _weights(weights)
    dtype = x.dtype if x_scale is None else torch.bfloat16
    return [tensor for down in (layer.shared_w2, layer.w2) for tensor in _give(new_hidden(x.shape[0], down, dtype), down)]


@torch.library.custom_op("llama4_kernels::moe_down", mutates_args=())
def _moe_down(
    shared: Tensor,
    shared_scale: Tensor | None,
    routed: Tensor,
    routed_scale: Tensor | None,
    routing: list[Tensor],
    weights: list[Tensor | None],
    out_dtype: torch.dtype,
) -> Tensor:
    layer = _weights(weights)
    if checks.values_wanted(shared.device):
        checks.routing_values("moe_down", Routing(*routing))
        checks.scale_values("moe_down", "shared.scale", shared_scale, finite=False)
        checks.scale_values("moe_down", "routed.scale", routed_scale, finite=False)
        _check_weight_values("moe_down", layer)
    halves = _join(shared, shared_scale), _join(routed, routed_scale)
    return backend.call("moe_down", shared.device, *halves, Routing(*routing), layer, out_dtype=out_dtype)


@_moe_down.register_fake
def _(
    shared: Tensor,
    shared_scale: Tensor | None,
    routed: Tensor,
    routed_scale: Tensor | None,
    routing: list[Tensor],
    weights: list[Tensor | None],
    out_dtype: torch.dtype,
) -> Tensor:
    return shared.new_empty(shared.shape[0], _weights(weights).router.shape[1], dtype=out_dtype)


@torch.library.custom_op("llama4_kernels::fused_moe", mutates_args=())
def _fused_moe(x: Tensor, weights: list[Tensor | None]) -> Tensor:
    layer = _weights(weights)
    if checks.values_wanted(x.device):
        _check_weight_values("fused_moe", layer)
    return backend.call("fused_moe", x.device, x, layer)


@_fused_moe.register_fake
def _(x: Tensor, weights: list[Tensor | None]) -> Tensor:
    return torch.empty_like(x)


def _check_weights(op: str, weights: MoEWeights, hidden: int | str, device: torch.device) -> None:
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"{op}: weights is {type(weights).__name__}, needs MoEWeights")
    router = checks.tensor(op, "weights.router", weights.router, dtype=checks.FLOATS, shape=("E", hidden), device=device)
    experts, hidden = router.shape
    if experts == 0:
        raise ValueError(f"{op}: weights.router has shape [0, {hidden}], needs at least one expert")
    for prefix, stack in (("", (experts,)), ("shared_", ())):
        w13, w2 = getattr(weights, f"{prefix}w13"), getattr(weights, f"{prefix}w2")
        checks.linear(op, f"weights.{prefix}w2", w2, shape=(*stack, hidden, "I"), device=device)
        checks.linear(op, f"weights.{prefix}w13", w13, shape=(*stack, 2 * w2.weight.shape[-1], hidden), device=device)


def _check_weight_values(op: str, weights: MoEWeights) -> None:
    for name in ("w13", "w2", "shared_w13", "shared_w2"):
        checks.linear_values(op, f"weights.{name}", getattr(weights, name))


def _check_quantized_input(op: str, x: Quantized, weights: MoEWeights) -> None:
    if x.granularity == "tensor":
        raise ValueError(f"{op}: x.scale has shape [], needs one scale per token or per 128 columns of a token")
    for name in ("w13", "shared_w13"):
        linear = getattr(weights, name)
        if linear.scale is None:
            raise TypeError(f"{op}: x is Quantized, needs the unquantised Tensor, because weights.{name} is not fp8")
        if linear.input_scale is not None:
            raise ValueError(f"{op}: x is Quantized, needs the unquantised Tensor, because weights.{name} has an input_scale")


def _check_hidden(op: str, name: str, hidden: Tensor | Quantized, down_name: str, down: Linear) -> None:
    if isinstance(hidden, Tensor):
        if down.scale is not None:
            raise TypeError(f"{op}: {name} is a Tensor, needs Quantized as moe_gate_up returns it, because weights.{down_name} is fp8")
        return
    if down.scale is None:
        raise TypeError(f"{op}: {name} is Quantized, needs a Tensor, because weights.{down_name} is not fp8")
    if down.input_scale is None and hidden.granularity != "block":
        raise ValueError(f"{op}: {name}.scale has shape {list(hidden.scale.shape)}, needs one scale per 128 columns of a row")
    if down.input_scale is not None and hidden.granularity != "tensor":
        raise ValueError(f"{op}: {name}.scale has shape {list(hidden.scale.shape)}, needs [], that of weights.{down_name}.input_scale")


def _join(values: Tensor, scale: Tensor | None) -> Tensor | Quantized:
    return values if scale is None else Quantized(values, scale)


def _give(hidden: Tensor | Quantized, down: Linear) -> list[Tensor]:
    """Hidden activations as an op may return them: without a static scale, which is an input."""
    if isinstance(hidden, Tensor):
        return [hidden]
    return [hidden.codes, hidden.scale] if down.input_scale is None else [hidden.codes]


def _take(tensors: list[Tensor], down: Linear) -> tuple[Tensor | Quantized, list[Tensor]]:
    """The inverse of _give; also returns the tensors left over."""
    if down.scale is None:
        return tensors[0], tensors[1:]
    if down.input_scale is not None:
        return Quantized(tensors[0], down.input_scale), tensors[1:]
    return Quantized(tensors[0], tensors[1]), tensors[2:]


def _flat_routing(routing: Routing) -> list[Tensor]:
    return [routing.expert_ids, routing.scores, routing.order, routing.offsets]


def _flat_weights(weights: MoEWeights) -> list[Tensor | None]:
    linears = (weights.w13, weights.w2, weights.shared_w13, weights.shared_w2)
    return [weights.router, *(part for linear in linears for part in (linear.weight, linear.scale, linear.input_scale))]


def _weights(flat: list[Tensor | None]) -> MoEWeights:
    return MoEWeights(flat[0], *(Linear(*flat[start : start + 3]) for start in range(1, len(flat), 3)))
