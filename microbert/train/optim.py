"""Parameter groups, the optimizers and the learning-rate schedules.

Shapes: n matrices of r rows and c columns.
"""

import abc
import typing
from collections.abc import Callable

import torch
from torch import Tensor, nn

from microbert.config.constants import Config
from microbert.config.learning_rate import peak_learning_rate
from microbert.runtime.device import has_bf16

BETAS = (0.9, 0.98)  # RoBERTa's second beta (arXiv:1907.11692): steadier than 0.999 when a run has few steps
EPS = 1e-6
MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's polynomial, as Jordan found them
RMS = 0.2  # of AdamW's updates, so that one learning rate suits both (Liu et al. 2025, arXiv:2502.16982)
FUSED = ("cpu", "cuda")  # where torch's fused AdamW reads `found_inf`; Apple's GPUs ignore it (pytorch/pytorch#186360)
MUON, ADAMW, NO_DECAY = "muon", "adamw", "no decay"


def parameter_groups(model: nn.Module, optimizer: str) -> dict[str, dict[str, nn.Parameter]]:
    """Which parameters are treated alike: by group, then by name. Every parameter is in exactly one.

    Biases and norms do not decay, as in BERT. Muon is for matrices between hidden states; word and position embeddings are none.
    """
    hidden = (
        {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        if optimizer == "muon"
        else set()
    )
    groups: dict[str, dict[str, nn.Parameter]] = {MUON: {}, ADAMW: {}, NO_DECAY: {}}
    for name, parameter in model.named_parameters():
        groups[NO_DECAY if parameter.ndim < 2 else MUON if id(parameter) in hidden else ADAMW][name] = parameter
    return groups


class Optimizer:
    """AdamW; or Muon for the hidden matrices with AdamW for the rest: as one."""

    def __init__(self, model: nn.Module, config: Config, is_captured: bool = False) -> None:
        """is_captured: whether a CUDA graph is made of `step`."""
        groups = parameter_groups(model, config.optimizer)
        self._named = {name: parameter for group in groups.values() for name, parameter in group.items()}
        adamw = [
            {"params": list(groups[ADAMW].values()), "weight_decay": config.weight_decay},
            {"params": list(groups[NO_DECAY].values()), "weight_decay": 0.0},
        ]
        if next(model.parameters()).device.type in FUSED:
            peak = peak_learning_rate(config)
            first = torch.optim.AdamW(adamw, lr=peak, betas=BETAS, eps=EPS, fused=True, capturable=is_captured)
        else:
            first = GuardedAdamW(adamw, {"lr": 0.0})
        self.members: list[torch.optim.Optimizer] = [first]
        self._moments = {name: ("exp_avg", "exp_avg_sq") for name in self._named}
        if groups[MUON]:
            n_matrices = {
                module.weight: getattr(module, "n_matrices", 1)
                for module in model.modules()
                if isinstance(module, nn.Linear)
            }
            self.members.append(
                Muon({parameter: n_matrices[parameter] for parameter in groups[MUON].values()}, config.weight_decay)
            )
            self._moments |= {name: ("momentum",) for name in groups[MUON]}

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def step(self, learning_rate: float | Tensor, is_broken: Tensor) -> None:
        """learning_rate: a number, or [] on the device.

        is_broken: [], 1.0 where weights and moments are to stay as they are. The device need not be waited for.
        Allocates all memory before it changes anything, so it can be repeated where memory runs out.
        """
        for name in self._named:
            self._begin(name, 0)
        for member in self.members:
            member.found_inf = is_broken  # which torch's fused optimizers read
            for group in member.param_groups:
                group["lr"] = learning_rate
        # torch's AdamW is fused, so it needs no memory once there are moments
        changes = [member.prepare() if isinstance(member, Prepared) else member.step for member in self.members]
        for change in changes:
            change()

    def begin_after(self, step: int) -> None:
        """Takes the state of a run that has taken so many steps, with moments of zero."""
        for name in self._named:
            self._state(name).clear()
            self._begin(name, step)

    def _begin(self, name: str, step: int) -> None:
        """Gives the parameter moments of zero, where it has none."""
        if not self._state(name):
            parameter = self._named[name]
            state = {key: torch.zeros_like(parameter) for key in self._moments[name]}
            if "exp_avg" in state:
                state["step"] = torch.tensor(float(step), device=parameter.device)
            self._state(name).update(state)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by kind and parameter, from the first step on. Adam's count of steps is the run's."""
        return {
            f"{key}.{name.replace('.feed_forward.', '.')}": self._state(name)[key]  # the names in checkpoints
            for name, keys in self._moments.items()
            for key in keys
            if key in self._state(name)
        }

    def _state(self, name: str) -> dict[str, Tensor]:
        member = self.members[-1 if "momentum" in self._moments[name] else 0]
        return member.state[self._named[name]]


class Prepared(torch.optim.Optimizer, abc.ABC):
    """An optimizer that reads `found_inf`, and whose step has a part that allocates memory and a part that changes
    weights."""

    found_inf: Tensor

    @abc.abstractmethod
    def prepare(self) -> Callable[[], None]:
        """Allocate all memory of a step, and return what changes weights and moments.

        Where `found_inf`, gradients become 0.
        """

    def step(self) -> None:
        self.prepare()()


class GuardedAdamW(Prepared):
    """The same as torch's fused AdamW with BETAS and EPS, and reads `found_inf` on every device."""

    @torch.no_grad()
    def prepare(self) -> Callable[[], None]:
        is_broken = self.found_inf.bool()
        weights = [torch.where(is_broken, 0.0, 1 - beta) for beta in BETAS]
        changes = []  # a parameter, its rate, what is left of it by decay, and the corrections of its moments
        for group in self.param_groups:
            rate = torch.where(is_broken, 0.0, group["lr"])
            kept = 1 - rate * group["weight_decay"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    state.update(moments, step=torch.zeros_like(self.found_inf))
                parameter.grad.masked_fill_(is_broken, 0.0)
                n_steps = (state["step"] + 1 - self.found_inf).clamp_min(1)  # 0 where the first step is broken
                changes.append((parameter, rate, kept, [1 - beta**n_steps for beta in BETAS]))
        largest = max((parameter for parameter, *_ in changes), key=Tensor.numel)
        rooms = [torch.empty_like(largest).flatten() for _ in BETAS]

        @torch.no_grad()
        def change() -> None:
            for parameter, rate, kept, corrections in changes:
                state = self.state[parameter]
                update, root = (room[: parameter.numel()].view_as(parameter) for room in rooms)
                state["step"] += 1 - self.found_inf
                state["exp_avg"].lerp_(parameter.grad, weights[0])
                state["exp_avg_sq"].lerp_(torch.mul(parameter.grad, parameter.grad, out=update), weights[1])
                torch.div(state["exp_avg"], corrections[0], out=update).mul_(rate)
                torch.div(state["exp_avg_sq"], corrections[1], out=root).sqrt_().add_(EPS)
                parameter.mul_(kept).sub_(update.div_(root))

        return change


class Muon(Prepared):
    """Momentum whose update is made orthogonal, so that it moves all directions of a matrix alike (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The same as `torch.optim.Muon` with adjust_lr_fn="match_rms_adamw", but for what these models need: all matrices of a shape are taken at once;
    query, key and value are matrices of their own; bf16 only where the device is fast in it, which CPUs without instructions for it are not;
    and `found_inf`.
    """

    def __init__(self, n_matrices: dict[nn.Parameter, int], weight_decay: float) -> None:
        """n_matrices: how many lie over each other in a parameter."""
        super().__init__(list(n_matrices), {"lr": 0.0, "weight_decay": weight_decay})
        self._n_matrices = n_matrices

    @torch.no_grad()
    def prepare(self) -> Callable[[], None]:
        (group,) = self.param_groups
        is_broken = self.found_inf.bool()
        weight = torch.where(is_broken, 0.0, 1 - MOMENTUM)
        rate = torch.where(is_broken, 0.0, group["lr"])
        kept = 1 - rate * group["weight_decay"]
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}  # of their matrices, as wide ones
        for parameter in group["params"]:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            parameter.grad.masked_fill_(is_broken, 0.0)
            rows, columns = parameter.shape[0] // self._n_matrices[parameter], parameter.shape[1]
            by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(parameter)
        changes = []  # weights, and what is subtracted from them, both as wide matrices
        for shape, parameters in by_shape.items():
            weights = [part for parameter in parameters for part in self._wide_parts(parameter, parameter)]
            updates = orthogonalise(
                torch.stack(
                    [
                        part
                        for parameter in parameters
                        for part in self._wide_parts(parameter, self._direction(parameter, weight))
                    ]
                )
            )
            updates *= RMS * max(shape) ** 0.5 * rate
            changes += zip(weights, updates)

        @torch.no_grad()
        def change() -> None:
            for parameter in group["params"]:
                self.state[parameter]["momentum"].lerp_(parameter.grad, weight)
            for weights, update in changes:
                weights.mul_(kept).sub_(update)

        return change

    def _wide_parts(self, parameter: nn.Parameter, values: Tensor) -> list[Tensor]:
        """The parameter's matrices in `values`, which has its shape, each with at least as many columns as rows."""
        parts = values.chunk(self._n_matrices[parameter])
        return [part.T if part.shape[0] > part.shape[1] else part for part in parts]

    def _direction(self, parameter: nn.Parameter, weight: Tensor) -> Tensor:
        """Nesterov's momentum after this step's gradient has got so much weight in it."""
        momentum = self.state[parameter]["momentum"].lerp(parameter.grad, weight)
        return parameter.grad.lerp(momentum, MOMENTUM)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Brings the singular values of each near 1 by Newton and Schulz's iteration. [n, r, c], with r at most c; returns fp32."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if has_bf16(x.device):
        x = x.bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # [n, r, r]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


class Schedule(typing.Protocol):
    """The constants of a learning-rate schedule: those of a Config, or of fine-tuning."""

    @property
    def schedule(self) -> str: ...
    @property
    def warmup_ratio(self) -> float: ...
    @property
    def decay_ratio(self) -> float: ...


def learning_rate_share(position: float, total_steps: int, config: Schedule) -> float:
    """The share of the peak at a position of the run, from 0 to total_steps: linear warm-up to 1, then by `schedule`.

    "linear" falls from there on; "wsd" (warm-up, stable, decay) holds the peak and falls in the last `decay_ratio`. Both would reach 0 at total_steps.
    """
    warmup, falling = _phases(total_steps, config)
    if position < warmup:
        return (position + 1) / (warmup + 1)
    return max(0.0, min(1.0, (total_steps - position) / falling))


def _phases(total_steps: int, config: Schedule) -> tuple[int, int]:
    """Return the steps of the warm-up and of the decay, which never overlap."""
    warmup = min(int(total_steps * config.warmup_ratio), total_steps - 1)
    rest = total_steps - warmup
    return warmup, rest if config.schedule == "linear" else min(rest, max(1, int(total_steps * config.decay_ratio)))


def reach(config: Config, total_steps: int) -> float:
    """Return the sum of the learning rates of a run: no weight moves by more than about this."""
    warmup, falling = _phases(total_steps, config)
    return peak_learning_rate(config) * (warmup / 2 + (total_steps - warmup - falling) + (falling + 1) / 2)
