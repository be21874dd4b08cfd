"""Train the demo checkpoint on CPU: a 15.7M parameter GLM-4 model, in fp32, exported as bf16.

Run from the repository root: `python -m benchmarks.demo_checkpoint.train --text DIR --out DIR --minutes N`.
"""

import argparse
import copy
import json
import math
import queue
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, Glm4Config, PreTrainedConfig, PreTrainedModel

from benchmarks.demo_checkpoint.data import PREFIX, Mixture
from benchmarks.demo_checkpoint.split import Split, make_split

STEP_TOKENS = 4096
MICRO_TOKENS = 512  # per backward pass, at least one row; small, so that the threads share the passes evenly
SHORT, LONG = 512, 2048  # row lengths; long rows teach the positions up to the context limit
LONG_EVERY, LONG_FROM = 4, 0.5
WARMUP, DECAY_FROM = 0.01, 0.55  # shares of the training time: warm-up, stable, linear decay to zero
MUON_RATE, ADAM_RATE = 0.02, 0.003
SAVE_SECONDS = 300
EARLY_EXPORT_STEP = 100
IGNORED = -100


def model_config(tokenizer: Tokenizer) -> Glm4Config:
    """Return the configuration of the demo model."""
    end = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    return Glm4Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        pad_token_id=end[0],
        eos_token_id=end,
        bos_token_id=None,
    )


def orthogonalise(update: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrix to `update` (... x rows x columns), by Newton-Schulz steps."""
    tall = update.shape[-2] > update.shape[-1]
    wide = update.mT if tall else update
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, in fp32 (the one in torch computes in bf16, slow on CPU)."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, pool: ThreadPoolExecutor) -> None:
        """Take matrices only; `pool` orthogonalises them side by side."""
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "decay": 0.01})
        self.pool = pool

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix."""
        for group in self.param_groups:
            list(self.pool.map(lambda parameter, group=group: self.update(parameter, group), group["params"]))

    @torch.no_grad()
    def update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Update one matrix."""
        assert parameter.grad is not None
        state = self.state[parameter]
        buffer = state.setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - group["momentum"])
        direction = orthogonalise(parameter.grad.lerp(buffer, group["momentum"]))
        scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["decay"])
        parameter.add_(direction, alpha=-group["lr"] * scale)


def optimizers(model: PreTrainedModel, pool: ThreadPoolExecutor) -> tuple[torch.optim.Optimizer, ...]:
    """Return Muon for the matrices of the layers and AdamW for everything else."""
    # Experts are matrices stacked in three dimensions.
    layers = [p for p in model.model.layers.parameters() if p.ndim >= 2]
    known = {id(p) for p in layers}
    others = [p for p in model.parameters() if id(p) not in known]
    return Muon(layers, MUON_RATE, pool), torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)


def rate(progress: float) -> float:
    """Return the learning rate factor at a share of the training time."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.02)
    return min(1.0, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


def share(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same parameters in the same memory, but gradients of its own."""
    replica = copy.deepcopy(model)
    for target, source in zip(replica.parameters(), model.parameters(), strict=True):
        target.data = source.data
    for target, source in zip(replica.buffers(), model.buffers(), strict=True):
        target.data = source.data
    return replica


@dataclass
class Progress:
    """What a run has done; `seconds` counts training time over all resumed parts."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = float("nan")


class Run:
    """A resumable training run."""

    def __init__(self, options: argparse.Namespace, config: Callable[[Tokenizer], PreTrainedConfig]) -> None:
        """Build the data, the model and the optimizers, from the saved state with `--resume`."""
        self.options = options
        self.split: Split = make_split(options.text)
        self.tokenizer = Tokenizer.from_file(str(options.export / "tokenizer.json"))
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(config(self.tokenizer), dtype=torch.float32)
        # One thread per pass: on a busy machine, threads that share every operation wait for each other.
        self.pool = ThreadPoolExecutor(options.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.optimizers = optimizers(self.model, self.pool)
        self.progress = Progress()
        self.state_path: Path = options.out / "state.pt"
        if options.resume and self.state_path.exists():
            self.load()
        self.mixture = Mixture(self.tokenizer, self.split, seed=self.progress.step)
        self.unpredictable = torch.tensor([self.tokenizer.token_to_id(t) for t in ("[gMASK]", "<sop>")])
        self.replicas: queue.SimpleQueue[PreTrainedModel] = queue.SimpleQueue()
        for replica in (self.model, *(share(self.model) for _ in range(options.threads - 1))):
            self.replicas.put(replica)
        parameters = sum(p.numel() for p in self.model.parameters())
        print(f"{parameters} parameters; {self.mixture.sizes()}", flush=True)

    def accumulate(self, rows: int, length: int, passes: int) -> float:
        """Add the gradient of one of `passes` passes to a replica; return its loss in nats per token."""
        batch = torch.from_numpy(self.mixture.batch(rows, length))
        targets = batch[:, 1:].clone()
        targets[torch.isin(targets, self.unpredictable)] = IGNORED
        replica = self.replicas.get()
        logits = replica(input_ids=batch[:, :-1].contiguous(), use_cache=False).logits.flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
        (loss / passes).backward()  # type: ignore[no-untyped-call]
        self.replicas.put(replica)
        return loss.item()

    def gather(self) -> None:
        """Move the gradients of all replicas into the model."""
        replicas = [self.replicas.get() for _ in range(self.options.threads)]
        for replica in replicas:
            self.replicas.put(replica)
            if replica is self.model:
                continue
            for target, source in zip(self.model.parameters(), replica.parameters(), strict=True):
                if source.grad is not None:
                    target.grad = source.grad if target.grad is None else target.grad.add_(source.grad)
                    source.grad = None

    def step(self, length: int, factor: float) -> float:
        """Take one optimizer step on `STEP_TOKENS` tokens in rows of `length`; return the loss."""
        rows = max(1, MICRO_TOKENS // length)
        passes = STEP_TOKENS // (rows * length)
        losses = list(self.pool.map(lambda _: self.accumulate(rows, length, passes), range(passes)))
        self.gather()
        for optimizer, base in zip(self.optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return sum(losses) / passes

    def train(self) -> None:
        """Train until the time is used up, saving on the way."""
        total = self.options.minutes * 60
        saved = self.progress.seconds
        mark = (time.monotonic(), self.progress.tokens)
        while self.progress.seconds < total and self.progress.step < self.options.steps:
            start = time.monotonic()
            share = self.progress.seconds / total
            long = share > LONG_FROM and self.progress.step % LONG_EVERY == 0
            loss = self.step(LONG if long else SHORT, rate(share))
            now = self.progress
            now.loss = loss if math.isnan(now.loss) else 0.95 * now.loss + 0.05 * loss
            now.step, now.tokens = now.step + 1, now.tokens + STEP_TOKENS
            now.seconds += time.monotonic() - start
            if now.step % 10 == 0:
                speed = (now.tokens - mark[1]) / (time.monotonic() - mark[0])
                mark = (time.monotonic(), now.tokens)
                print(
                    f"step {now.step} loss {loss:.3f} mean {now.loss:.3f} tokens {now.tokens} "
                    f"seconds {now.seconds:.0f}/{total:.0f} rate {rate(share):.3f} tokens/s {speed:.0f}",
                    flush=True,
                )
            if now.step == EARLY_EXPORT_STEP or now.seconds - saved > SAVE_SECONDS:
                saved = now.seconds
                self.save()
        self.save()

    def save(self) -> None:
        """Write the resumable state and the exported checkpoint, each by a rename."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": vars(self.progress),
        }
        temporary = self.state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.state_path)
        export(self.model, self.options.export)

    def load(self) -> None:
        """Read the resumable state."""
        state = torch.load(self.state_path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])


def export(model: PreTrainedModel, out: Path) -> None:
    """Write the model rounded to bf16, with its configuration; readers never see half a file."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    end = model.config.eos_token_id
    rounded.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=model.config.pad_token_id, do_sample=False, max_new_tokens=128
    )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        rounded.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)  # safetensors creates its files readable by the owner only
            path.replace(out / path.name)


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokenizer: Tokenizer, split: Split) -> dict[str, dict[str, float]]:
    """Measure the evaluation extracts per language: perplexity per token, bits per UTF-8 byte, tokens."""
    prefix = torch.tensor(tokenizer.encode(PREFIX, add_special_tokens=False).ids)
    results: dict[str, dict[str, float]] = {}
    for (language, held), documents in sorted(split.held.items()):
        if held != "evaluation":
            continue
        nats, count, size = 0.0, 0, 0
        for document in documents:
            encoded = tokenizer.encode(document.text, add_special_tokens=False).ids
            ids = torch.tensor(encoded[: LONG - len(prefix)])
            row = torch.cat([prefix, ids])[None]
            logits = model(input_ids=row).logits[0, len(prefix) - 1 : -1].float()
            nats += nn.functional.cross_entropy(logits, ids, reduction="sum").item()
            count += len(ids)
            size += len(tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode())
        bits = nats / math.log(2) / size
        results[language] = {"perplexity": math.exp(nats / count), "bits_per_byte": bits, "tokens": count}
    return results


def arguments(description: str | None, export: Path) -> argparse.Namespace:
    """What the command line asks for; `export`: where the checkpoint goes if it does not say."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--text", type=Path, required=True, help="folder with python-docs/ and udhr/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the figures")
    parser.add_argument("--export", type=Path, default=export)
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--steps", type=int, default=10**9, help="stop after this many steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train the demo checkpoint."""
    options = arguments(__doc__, Path("glmexport/demo/checkpoint"))
    torch.set_num_threads(options.threads)
    finish(Run(options, model_config))


def finish(run: Run) -> None:
    """Train, export and measure."""
    options = run.options
    run.train()
    model = AutoModelForCausalLM.from_pretrained(options.export, dtype=torch.float32).eval()
    results = {"progress": vars(run.progress), "evaluation": evaluate(model, run.tokenizer, run.split)}
    text = json.dumps(results, indent=2)
    (options.out / "figures.json").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main()
