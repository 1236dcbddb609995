"""The engine of `task: optimize`: each picture is optimized with the scores (paper, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smsbatch.diffusion.lora_files import check_style
from smsbatch.diffusion.priors.files import model_digests
from smsbatch.engines.base import Description, Engine, Rendered, Weights, finite
from smsbatch.manifest import PAPERS, Optimize, Style, Styled
from smsbatch.text import code_span, count

if TYPE_CHECKING:
    from torch import Tensor


class OptimizeEngine(Engine[Optimize]):
    """Optimizes the latents of a batch in lockstep, independently of each other."""

    diverged_hint = "the latent is not finite; lower objective.learning_rate"
    oom_hint = "lower image.resolution"

    def __init__(self, manifest: Optimize, device: str) -> None:
        from smsbatch.diffusion.priors.load import load_models

        self.prior, self.style = load_models(manifest, device)
        self.device = self.prior.device
        self.objective, self.steps = manifest.objective, manifest.objective.steps
        self._words, self._batch_size = manifest.style.prompt, manifest.compute.batch_size

    @staticmethod
    def steps_per_image(manifest: Optimize) -> int:
        return manifest.objective.steps

    @staticmethod
    def check_weights(manifest: Styled) -> Weights:
        notices = check_style(manifest)
        models = {manifest.model.path} | ({manifest.style.model.path} if manifest.style.model else set())
        found = f"{' and '.join(sorted(models))} with {' and '.join(manifest.style.lora) or 'no LoRA'}"
        return Weights(found, notices)

    @staticmethod
    def digests(manifest: Styled) -> dict[str, str]:
        return model_digests(manifest)

    @staticmethod
    def describe(settings: Mapping[str, Any], about: Mapping[str, Any] | None) -> Description:
        model, objective = settings["model"], settings["objective"]
        style = Style.model_validate(settings["style"])
        name, paper = PAPERS[objective["name"]]
        steps = count(objective["steps"], "step")
        parts = [code_span(style.prompt)]
        parts += [f"LoRA {code_span(path)} at scale {scale:g}" for path, scale in style.loras]
        parts += [f"model {code_span(style.model.path)}"] if style.model is not None else []
        revision = f" at {code_span(model['revision'])}" if model["revision"] else ""
        return Description(
            style=style.prompt,
            work=f"{steps} of {objective['name'].upper()} each",
            method=f"with [{name}](https://arxiv.org/abs/{paper})",
            facts=[
                ("style", ", ".join(parts)),
                ("model", code_span(model["path"]) + revision),
                ("objective", f"{code_span(objective['name'])}, preset {code_span(objective['preset'])}, {steps}"),
            ],
        )

    def prompt(self, caption: str) -> str:
        return self.objective.prompts(self._words, caption).target

    def batch_size(self, height: int, width: int) -> int:
        return self._batch_size

    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        import torch

        from smsbatch.diffusion.optimize import optimize

        z, steps = optimize(
            self.prior,
            self.style,
            # One at a time, as below: it is a small part of the work, but in a batch the highest peak of memory.
            torch.cat([self.prior.encode(row[None]) for row in images]),
            [self.objective.prompts(self._words, caption) for caption in captions],
            seeds,
            self.objective,
            progress,
        )
        size = (images.shape[-2], images.shape[-1])
        results = torch.cat([self.prior.decode(row[None], size) for row in z.nan_to_num()])
        return Rendered(results, steps, finite(z) & finite(results))
