"""Parameter groups and the optimizers.

Shapes: n matrices of r rows and c columns.
"""

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from microbert.config.constants import Config
from microbert.runtime.device import has_bf16
from microbert.train.gradients import gradient_of

BETAS = (0.9, 0.98)  # RoBERTa's second beta (arXiv:1907.11692): steadier than 0.999 when a run has few steps
EPS = 1e-6
MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's polynomial for Muon
RMS = 0.2  # of AdamW's updates, so that one learning rate suits both (Liu et al. 2025, arXiv:2502.16982)
# devices whose fused AdamW reads `found_inf`; on Apple's GPUs it ignores it (pytorch/pytorch#186360)
FUSED = ("cpu", "cuda")
MUON, ADAMW, NO_DECAY = "muon", "adamw", "no decay"


def parameter_groups(model: nn.Module, optimizer: str) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters by group and name. Every parameter is in exactly one group.

    As in BERT, biases and norms do not decay. Muon updates the matrices between hidden states; word and position
    embeddings are not among them.
    """
    hidden: set[int] = set()
    if optimizer == "muon":
        hidden = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups: dict[str, dict[str, nn.Parameter]] = {MUON: {}, ADAMW: {}, NO_DECAY: {}}
    for name, parameter in model.named_parameters():
        groups[NO_DECAY if parameter.ndim < 2 else MUON if id(parameter) in hidden else ADAMW][name] = parameter
    return groups


class Optimizer:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest, as one optimizer."""

    def __init__(self, model: nn.Module, config: Config, is_captured: bool = False) -> None:
        """is_captured: `step` becomes part of a CUDA graph."""
        groups = parameter_groups(model, config.optimizer)
        self._named = {name: parameter for group in groups.values() for name, parameter in group.items()}
        adamw = [
            {"params": list(groups[ADAMW].values()), "weight_decay": config.weight_decay},
            {"params": list(groups[NO_DECAY].values()), "weight_decay": 0.0},
        ]
        self.members: list[FusedAdamW | TwoPhaseOptimizer] = []
        if next(model.parameters()).device.type in FUSED:
            self.members.append(FusedAdamW(adamw, betas=BETAS, eps=EPS, fused=True, capturable=is_captured))
        else:
            self.members.append(GuardedAdamW(adamw, {"lr": 0.0}))
        self._moments: dict[str, tuple[str, ...]] = {name: ("exp_avg", "exp_avg_sq") for name in self._named}
        if groups[MUON]:
            n_matrices = {
                module.weight: getattr(module, "n_matrices", 1)
                for module in model.modules()
                if isinstance(module, nn.Linear)
            }
            hidden = {parameter: n_matrices[parameter] for parameter in groups[MUON].values()}
            self.members.append(Muon(hidden, config.weight_decay))
            self._moments |= dict.fromkeys(groups[MUON], ("momentum",))

    def step(self, learning_rate: float | Tensor, is_broken: Tensor) -> None:
        """Update the weights without waiting for the device.

        learning_rate: a number, or [] on the device. is_broken: []; 1.0 leaves weights and moments unchanged.
        Allocates all memory before it changes anything, so it can be repeated after running out of memory.
        """
        for name in self._named:
            self._begin(name, 0)
        for member in self.members:
            member.found_inf = is_broken
            for group in member.param_groups:
                group["lr"] = learning_rate
        changes = [member.prepare() for member in self.members]
        for change in changes:
            change()

    def begin_after(self, step: int) -> None:
        """Set the state of a run after that many steps, with moments of zero."""
        for name in self._named:
            self._state(name).clear()
            self._begin(name, step)

    def _begin(self, name: str, step: int) -> None:
        """Create the parameter's moments as zeros, unless they exist."""
        if not self._state(name):
            parameter = self._named[name]
            state = {key: torch.zeros_like(parameter) for key in self._moments[name]}
            if "exp_avg" in state:
                state["step"] = torch.tensor(float(step), device=parameter.device)
            self._state(name).update(state)

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments by kind and parameter; empty before the first step. Adam's step count is the run's."""
        return {
            f"{key}.{name.replace('.feed_forward.', '.')}": self._state(name)[key]  # the names in checkpoints
            for name, keys in self._moments.items()
            for key in keys
            if key in self._state(name)
        }

    def _state(self, name: str) -> dict[str, Tensor]:
        member = self.members[-1 if "momentum" in self._moments[name] else 0]
        return member.state[self._named[name]]


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW. It reads `found_inf`, and allocates no memory once the moments exist."""

    found_inf: Tensor

    def prepare(self) -> Callable[[], object]:
        """Return the function that changes weights and moments."""
        return self.step


class TwoPhaseOptimizer(torch.optim.Optimizer, abc.ABC):
    """An optimizer that reads `found_inf`, and allocates all memory of a step before it changes any weight."""

    found_inf: Tensor

    @abc.abstractmethod
    def prepare(self) -> Callable[[], object]:
        """Allocate all memory of a step, and return the function that changes weights and moments.

        Gradients become 0 where `found_inf` is set.
        """

    def step(self, closure: Any = None) -> Any:
        self.prepare()()


class GuardedAdamW(TwoPhaseOptimizer):
    """The same as torch's fused AdamW with BETAS and EPS, but reads `found_inf` on every device."""

    @torch.no_grad()
    def prepare(self) -> Callable[[], None]:
        is_broken = self.found_inf.bool()
        weights = [torch.where(is_broken, 0.0, 1 - beta) for beta in BETAS]
        changes = []  # parameter, learning rate, factor of the weight decay, bias corrections of both moments
        for group in self.param_groups:
            rate = torch.where(is_broken, 0.0, group["lr"])
            kept = 1 - rate * group["weight_decay"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    state.update(moments, step=torch.zeros_like(self.found_inf))
                parameter.grad.masked_fill_(is_broken, 0.0)
                n_steps = (state["step"] + 1 - self.found_inf).clamp_min(1)  # 0 if the first step is broken
                changes.append((parameter, rate, kept, [1 - beta**n_steps for beta in BETAS]))
        largest = max((parameter for parameter, *_ in changes), key=Tensor.numel)
        buffers = [torch.empty_like(largest).flatten() for _ in BETAS]

        @torch.no_grad()
        def change() -> None:
            for parameter, rate, kept, corrections in changes:
                state = self.state[parameter]
                update, root = (buffer[: parameter.numel()].view_as(parameter) for buffer in buffers)
                state["step"] += 1 - self.found_inf
                state["exp_avg"].lerp_(parameter.grad, weights[0])
                state["exp_avg_sq"].lerp_(torch.mul(parameter.grad, parameter.grad, out=update), weights[1])
                torch.div(state["exp_avg"], corrections[0], out=update).mul_(rate)
                torch.div(state["exp_avg_sq"], corrections[1], out=root).sqrt_().add_(EPS)
                parameter.mul_(kept).sub_(update.div_(root))

        return change


class Muon(TwoPhaseOptimizer):
    """Momentum with an orthogonalised update, which moves all directions of a matrix by about the same distance.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon. Like `torch.optim.Muon` with
    adjust_lr_fn="match_rms_adamw", except that it updates all matrices of a shape at once, treats query, key and value
    as separate matrices, uses bf16 only on devices that are fast in it, and reads `found_inf`.
    """

    def __init__(self, n_matrices: dict[nn.Parameter, int], weight_decay: float) -> None:
        """n_matrices: by parameter, how many matrices it stacks."""
        super().__init__(list(n_matrices), {"lr": 0.0, "weight_decay": weight_decay})
        self._n_matrices = n_matrices

    @torch.no_grad()
    def prepare(self) -> Callable[[], None]:
        (group,) = self.param_groups
        is_broken = self.found_inf.bool()
        weight = torch.where(is_broken, 0.0, 1 - MOMENTUM)
        rate = torch.where(is_broken, 0.0, group["lr"])
        kept = 1 - rate * group["weight_decay"]
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}  # (smaller, larger) dimension
        for parameter in group["params"]:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            parameter.grad.masked_fill_(is_broken, 0.0)
            rows, columns = parameter.shape[0] // self._n_matrices[parameter], parameter.shape[1]
            by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(parameter)
        changes: list[tuple[Tensor, Tensor]] = []  # weights, and what to subtract from them; both wide matrices
        for shape, parameters in by_shape.items():
            weights = [part for parameter in parameters for part in self._wide_parts(parameter, parameter)]
            updates = orthogonalise(self._directions(parameters, weight))
            updates *= RMS * max(shape) ** 0.5 * rate
            changes += zip(weights, updates, strict=True)

        @torch.no_grad()
        def change() -> None:
            for parameter in group["params"]:
                self.state[parameter]["momentum"].lerp_(parameter.grad, weight)
            for weights, update in changes:
                weights.mul_(kept).sub_(update)

        return change

    def _wide_parts(self, parameter: nn.Parameter, values: Tensor) -> list[Tensor]:
        """Split `values`, of the parameter's shape, into matrices, and transpose those with more rows than columns."""
        parts = values.chunk(self._n_matrices[parameter])
        return [part.T if part.shape[0] > part.shape[1] else part for part in parts]

    def _directions(self, parameters: list[nn.Parameter], weight: Tensor) -> Tensor:
        """Return Nesterov's momentum of matrices of one shape, [n, r, c]. weight: of this step's gradient in it."""
        wide_parts = []
        for parameter in parameters:
            gradient = gradient_of(parameter)
            momentum = self.state[parameter]["momentum"].lerp(gradient, weight)
            wide_parts += self._wide_parts(parameter, gradient.lerp(momentum, MOMENTUM))
        return torch.stack(wide_parts)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1 by a Newton-Schulz iteration.

    matrices: [n, r, c] with r <= c. Returns fp32 [n, r, c].
    """
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if has_bf16(x.device):
        x = x.bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # [n, r, r]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()
