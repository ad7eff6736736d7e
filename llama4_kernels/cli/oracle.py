"""What transformers computes for the same tokens: the reference that a served model is compared with.

Everything is float32, where not asked otherwise, with eager attention, one sequence at a time and without a cache, so that no optimisation
of the oracle can share a mistake with the engine.

An FP8 checkpoint has two oracles. `Oracle(dequantised)` holds the weights codes * scale and leaves activations alone. With
`quantise_activations=fp8_path` it also rounds the inputs of every quantised layer to e4m3, by the formulas that the ops document, written
here a second time in plain PyTorch:

    x of a layer with a scale per channel    one scale per token, max|x| / 448
    x of a layer with a scale per block      one scale per token and 128 columns
    h = silu(gate) * up of a MoE layer       one scale per token and 128 columns
    anything with a static activation scale  that scale

With tensor parallelism each rank rounds the part of x that it has: of the inputs of o_proj and down_proj, by scales of its own.

What is left between this oracle and the engine is float32 rounding, which moves an activation across a rounding boundary of e4m3 now and
then, and every later token sees the flipped code. So the comparison is of means, and `rounding_bound` says how far apart they may be.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from llama4_kernels.cli.checkpoint_files import BLOCK, E4M3_MAX, Header, headers, load_weights, scale_of


class Oracle:
    """transformers on the checkpoint in the folder `path`, on the CPU.

    path: a full-precision checkpoint.
    quantise_activations: the FP8 checkpoint that `path` was dequantised from, to round activations as it asks; None to leave them alone.
    dtype: what it computes in. ranks: of tensor parallelism, in which activations are rounded.
    """

    def __init__(
        self, path: str | Path, quantise_activations: str | Path | None = None, dtype: torch.dtype = torch.float32, ranks: int = 1
    ):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.path = Path(path)
        self.config = json.loads((self.path / "config.json").read_text())
        kind = getattr(transformers, self.config["architectures"][0])
        self.model = kind.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
        if quantise_activations is not None:
            self.round_activations(quantise_activations, ranks)

    def round_activations(self, path: str | Path, ranks: int) -> None:
        """From now on round activations as the FP8 checkpoint in the folder `path` asks, from which this one was dequantised."""
        _round_activations(self.model, headers(path), load_weights(path, "input_scale"), ranks)

    @torch.inference_mode()
    def logprobs(self, ids: list[int], **image: Tensor) -> tuple[Tensor, Tensor]:
        """For tokens 1 .. n - 1 of `ids`: the logprob of each given those before it, and the most likely token there; [n - 1] each.

        image: what the processor returns beside input_ids, such as pixel_values.
        """
        logprobs = self.model(input_ids=torch.tensor([ids]), use_cache=False, **image).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], logprobs.argmax(-1)

    @torch.inference_mode()
    def greedy(self, ids: list[int], tokens: int, **image: Tensor) -> list[int]:
        """The `tokens` most likely tokens after `ids`, one after the other; ends early at an end-of-sequence token, which is kept."""
        ids, start = list(ids), len(ids)
        while len(ids) < start + tokens:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False, **image).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] in self.config["eos_token_id"]:
                break
        return ids[start:]

    def rounding_sites(self) -> int:
        """In how many places of the model this oracle rounds activations."""
        return sum(getattr(module, "rounding_sites", 0) for module in self.model.modules())


def rounding_bound(whole_error: float, sites: int) -> float:
    """The mean |Δlogprob| from the rounding oracle that an engine must not exceed: half of what a mistake at a typical site would cost.

    whole_error: mean |Δlogprob| between the two oracles, that is, what rounding activations at all `sites` costs.

    The errors of the sites are independent and add up like variances, so that one of them is worth whole_error / sqrt(sites), if all weigh
    alike. A mistake at one site (another granularity, another order) replaces its error by another one that is independent of it, a
    difference of sqrt(2) times that. A mistake at a site that weighs less than most can stay below the bound.
    """
    return whole_error * math.sqrt(2 / sites) / 2


def _round_activations(model: nn.Module, stored: dict[str, Header], input_scales: dict[str, Tensor], ranks: int) -> None:
    """Make the layers that are FP8 in `stored` round their inputs."""
    stored = {name.removeprefix("language_model."): header for name, header in stored.items()}
    scales = {name.removeprefix("language_model."): tensor.float() for name, tensor in input_scales.items()}
    fp8 = {name for name, header in stored.items() if header.is_fp8}
    per_block = {name for name in fp8 if (scale := scale_of(name, stored)) and stored[scale].is_per_block(stored[name])}
    for name, module in model.named_modules():
        name = name.removeprefix("language_model.")
        if type(module).__name__ == "Llama4TextMoe":
            experts = f"{name}.experts"
            first = {f"{experts}.gate_up_proj", f"{experts}.0.gate_proj.weight"}
            if first & fp8:
                static = [scales.get(f"{experts}.{projection}_input_scale") for projection in ("gate_up_proj", "down_proj")]
                module.experts.forward = _RoundedExperts(module.experts, *static, bool(first & per_block), ranks)
                module.rounding_sites = 2
        elif isinstance(module, nn.Linear) and f"{name}.weight" in fp8:
            by_blocks = f"{name}.weight" in per_block or name.endswith("shared_expert.down_proj")
            parts = ranks if name.endswith(("o_proj", "down_proj")) else 1
            module.register_forward_pre_hook(_rounder(scales.get(f"{name}.input_scale"), by_blocks, parts))
            module.rounding_sites = 1


class _RoundedExperts:
    """Llama4TextExperts.forward with rounded activations. Its input is score * x, tokens repeated for every expert."""

    def __init__(self, experts: nn.Module, input_scale: Tensor | None, hidden_scale: Tensor | None, per_block: bool, ranks: int):
        self.experts, self.per_block, self.ranks = experts, per_block, ranks
        self.input_scale, self.hidden_scale = input_scale, hidden_scale

    def __call__(self, x: Tensor) -> Tensor:
        experts = self.experts
        x = _round(x, self.input_scale, self.per_block).view(experts.num_experts, -1, experts.hidden_size)
        gate, up = torch.bmm(x, experts.gate_up_proj).chunk(2, dim=-1)
        hidden = _round(nn.functional.silu(gate) * up, self.hidden_scale, per_block=True, parts=self.ranks)
        return torch.bmm(hidden, experts.down_proj).view(-1, experts.hidden_size)


def _rounder(scale: Tensor | None, per_block: bool, parts: int):
    return lambda module, arguments: (_round(arguments[0], scale, per_block, parts),)


def _round(x: Tensor, scale: Tensor | None, per_block: bool = False, parts: int = 1) -> Tensor:
    """x rounded to e4m3 and back, in so many equal parts of its columns: with the given scale, else with one per row, or per row and 128
    columns."""
    if parts > 1:
        return torch.cat([_round(part, scale, per_block) for part in x.chunk(parts, dim=-1)], dim=-1)
    if scale is not None:
        return _round_to(x, scale)
    if not per_block:
        return _round_to(x, x.float().abs().amax(-1, keepdim=True) / E4M3_MAX)
    return torch.cat([_round(block, None) for block in x.split(BLOCK, dim=-1)], dim=-1)


def _round_to(x: Tensor, scale: Tensor) -> Tensor:
    codes = torch.where(scale == 0, 0.0, x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)
