"""One training step of the generator (paper, section 4 and Algorithm 1).

The gradient of an objective on the latent z = E(G(x)) goes through the VAE's encoder E into the generator G: a score
distillation loss is the inner product <stop_grad(g), z>, whose gradient in z is g. Every picture of a step is repeated
B times with its own timesteps and noises; G and E run once per picture, and get the mean of the B gradients.

Losses are sums over a picture's latent entries (the paper's squared norms) and means over repeats and pictures; after
`average` they are means over all workers: w workers with n pictures each make the same step as one with w n.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from safetensors.torch import load, save
from torch import Tensor

from smsbatch.diffusion.fake import FakeScore
from smsbatch.diffusion.objectives import OBJECTIVES
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.diffusion.scores import ScoreModels
from smsbatch.diffusion.timesteps import allowed, draw, to_device
from smsbatch.generator.network import Generator
from smsbatch.manifest import Distill, Prompts, Training


def generator_learning_rate(step: int, training: Training) -> float:
    """Constant, then linear to zero over the last fraction `decay` of the objective's steps (as arXiv 1703.10593)."""
    left, falling = training.all_steps - step, training.decay * training.steps
    return training.learning_rate * min(1.0, left / falling if falling else 1.0)


class Distiller:
    """A generator in training, its running average, and the fake score that follows it.

    In the first `warmup_steps` the generator learns to reproduce its input, |G(x) - x| (paper, section 4). The
    objective's steps follow: Adam is reset, since the gradients have another scale, and the timesteps narrow over all
    of these steps (Eq. 7).

    Args:
        prior: the bare prior; its UNet carries the fake score's LoRA, which all pictures share.
        style: the model of the style score.
        average: replaces tensors by their means over all workers, in place.

    Attributes:
        step: finished steps, including the warm-up.
        generator: in training.
        ema: the generator with the running average of the parameters, the result of the training.
    """

    def __init__(
        self,
        prior: Prior,
        style: Prior,
        manifest: Distill,
        average: Callable[[list[Tensor]], None] = lambda tensors: None,
    ) -> None:
        self.training, self.config = manifest.distill, manifest.objective
        self._prior, self._style, self._average = prior, style, average
        self._at_once = manifest.compute.batch_size
        self.step = 0
        width, blocks, restore = self.training.width, self.training.blocks, self.training.restore
        self.generator = Generator.initialized(width, blocks, manifest.seed, restore=restore).to(prior.device)
        if manifest.compute.channels_last:
            self.generator.to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self._parameters = [parameter for parameter in self.generator.parameters() if parameter.requires_grad]
        self._optimizer = self._adam()
        self._fake: FakeScore | None = None
        if OBJECTIVES[self.config.name].asks_fake:
            self._fake = FakeScore(prior, self.config.fake, [torch.Generator().manual_seed(manifest.seed)])
        if self.training.checkpoint_vae:
            prior.checkpoint_encoder()

    @property
    def warming_up(self) -> bool:
        return self.step < self.training.warmup_steps

    def train_step(self, images: Tensor, prompts: Sequence[Prompts], seeds: Sequence[int]) -> dict[str, Tensor]:
        """One step on n pictures; `compute.batch_size` of them at once, their gradients added up.

        Everything random about a picture is drawn from its seed, on the CPU.

        Args:
            images: [n, 3, H, W] in [0, 1], on the prior's device.
            prompts, seeds: of each picture.

        Returns:
            The means over all pictures of all workers: "reconstruction" in the warm-up, else "objective" and, for an
            objective with a fake score, "fake". Each is a scalar on the device.
        """
        if self.step == self.training.warmup_steps:
            self._optimizer = self._adam()
        if self.warming_up:
            losses = {"reconstruction": self._reconstruct(images)}
        else:
            losses = self._distill(images, prompts, [torch.Generator().manual_seed(seed) for seed in seeds])
        self._average([*(p.grad for p in self._parameters if p.grad is not None), *losses.values()])
        self._optimizer.param_groups[0]["lr"] = generator_learning_rate(self.step, self.training)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        # A young average forgets faster, or the random initial values would stay in it for long.
        decay = min(self.training.ema, self.step / (self.step + 9))
        for average, parameter in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 - decay)
        return losses

    def _reconstruct(self, images: Tensor) -> Tensor:
        total = torch.zeros((), device=images.device)
        for first in range(0, len(images), self._at_once):
            x = images[first : first + self._at_once]
            with self._autocast():
                loss = (self.generator(x) - x).abs().mean() * (len(x) / len(images))
            loss.backward()
            total += loss.detach()
        return total

    def _distill(
        self, images: Tensor, prompts: Sequence[Prompts], draws: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Add the objective's gradient to the generator's parameters, and train the fake score."""
        config, training, device = self.config, self.training, images.device
        repeats, step = training.repeats, self.step - training.warmup_steps
        choices = allowed(
            step, training.steps, t_min=config.t_min, t_max=config.t_max, grid=config.grid, timesteps=config.timesteps
        )
        fake_min, fake_max = config.fake_range
        fake_choices = allowed(0, training.steps, t_min=fake_min, t_max=fake_max, grid=config.grid)
        totals = {"objective": torch.zeros((), device=device)}
        followed: list[tuple[Tensor, Sequence[torch.Generator], Tensor]] = []  # for the fake score's training
        if self._fake is not None:
            totals["fake"] = torch.zeros((), device=device)

        for first in range(0, len(images), self._at_once):
            chunk = slice(first, first + self._at_once)
            x, its_draws = images[chunk], draws[chunk]
            rows_prompts = [prompt for prompt in prompts[chunk] for _ in range(repeats)]
            with self._autocast():
                z = self._prior.encode(self.generator(x))
                z_src = self._prior.encode(x)
            objective = OBJECTIVES[config.name](config, self._prior.schedule, z_src.repeat_interleave(repeats, dim=0))
            learns_here = self._fake is not None and config.fake.trains_on == "forward"
            scores = ScoreModels(self._prior, self._style, self._fake, rows_prompts, graph=learns_here)
            z_rows = z.detach().repeat_interleave(repeats, dim=0)
            with torch.no_grad():
                if config.relevance != "off" and config.relevance_grid is not None:
                    of_pictures = ScoreModels(self._prior, self._style, None, prompts[chunk])
                    objective.cache_maps(of_pictures, partial(_noise, its_draws, z, 1), repeats)
                t, eps = _times(its_draws, choices, repeats, device), _noise(its_draws, z, repeats)
                gradient, loss = objective.gradient(z_rows, t, eps, scores)
                g = gradient.view(len(x), repeats, *z.shape[1:]).mean(1) * (z[0].numel() / len(images))
            z.backward(g)  # type: ignore[no-untyped-call]
            totals["objective"] += loss.sum() / (len(images) * repeats)
            if self._fake is not None and scores.fake_prediction is not None:
                share = 1 / (len(images) * repeats)
                totals["fake"] += share * self._fake.add_gradient(scores.fake_prediction, t, eps, share).sum()
            elif self._fake is not None:
                followed.append((z_rows, its_draws, scores.text("fake", "target")))

        if self._fake is not None and not followed:
            self._fake.update(self._average)
        for _ in range(config.fake.updates if followed else 0):
            totals["fake"] = self._follow(followed, fake_choices, len(images) * repeats)
        return totals

    def _follow(
        self, followed: Sequence[tuple[Tensor, Sequence[torch.Generator], Tensor]], choices: range, rows: int
    ) -> Tensor:
        """One step of the shared fake LoRA on the generator's latents, with its own timesteps and noises."""
        assert self._fake is not None
        total = torch.zeros((), device=followed[0][0].device)
        for z, draws, text in followed:
            repeats = len(z) // len(draws)
            t, eps = _times(draws, choices, repeats, z.device), _noise(draws, z, repeats)
            total += self._fake.add_gradient(self._fake.predict(z, t, eps, text), t, eps, 1 / rows).sum() / rows
        self._fake.update(self._average)
        return total

    def dump(self) -> bytes:
        """The whole state of the training, as safetensors."""
        tensors = {"step": torch.tensor(self.step)}
        for name, part in self._parts().items():
            tensors |= {f"{name}.{key}": value for key, value in part.items()}
        # Copies: safetensors refuses tensors that share memory or are not contiguous.
        return save(
            {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        )

    def restore(self, data: bytes) -> None:
        """Load the state that `dump` returned for the same manifest."""
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("generator", "ema", "adam", "fake", "fake_adam")}
        for name, value in load(data).items():
            part, _, key = name.partition(".")
            if part == "step":
                self.step = int(value)
            else:
                parts[part][key] = value  # loading moves it to the device; Adam's step counts stay on the CPU
        self.generator.load_state_dict(parts["generator"])
        self.ema.load_state_dict(parts["ema"])
        _load_state(self._optimizer, parts["adam"])
        if self._fake is not None:
            with torch.no_grad():
                for key, factor in self._fake.factors.items():
                    factor.copy_(parts["fake"][key])
            _load_state(self._fake.optimizer, parts["fake_adam"])

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        parts = {
            "generator": self.generator.state_dict(),
            "ema": self.ema.state_dict(),
            "adam": _state(self._optimizer),
        }
        if self._fake is not None:
            parts |= {"fake": self._fake.factors, "fake_adam": _state(self._fake.optimizer)}
        return parts

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self._parameters, lr=self.training.learning_rate, betas=self.training.betas)

    def _autocast(self) -> torch.autocast:
        """Generator and VAE compute in the prior's precision; their parameters are float32."""
        device = self._prior.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self._prior.dtype == torch.bfloat16)


def _times(draws: Sequence[torch.Generator], choices: range, repeats: int, device: torch.device) -> Tensor:
    """`repeats` timesteps for every picture, [n * repeats]."""
    return to_device(torch.tensor([draw(choices, generator) for generator in draws for _ in range(repeats)]), device)


def _noise(draws: Sequence[torch.Generator], like: Tensor, repeats: int) -> Tensor:
    """`repeats` noises for every picture, [n * repeats, C, h, w]."""
    shape = (repeats, *like.shape[1:])
    return to_device(torch.cat([torch.randn(shape, generator=generator) for generator in draws]), like.device)


def _state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, state in states.items() for key, value in state.items()}


def _load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
