"""Train a small mixture of experts with latent attention, of the shape of GLM-4.7-Flash, as the demo was trained.

Run from the repository root: `python -m benchmarks.moe_checkpoint.train --text DIR --out STATE --minutes N`.
"""

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Glm4MoeLiteConfig, PreTrainedModel

from benchmarks.demo_checkpoint.train import LONG, Run, arguments, finish

CHECKPOINT, DEMO = Path("benchmarks/moe_checkpoint/checkpoint"), Path("glmexport/demo/checkpoint")
#: How much the bias of a router moves after a step, towards experts with less than their share of tokens
#: (Wang et al., arXiv 2408.15664).
BALANCE_RATE = 0.003


def model_config(tokenizer: Tokenizer) -> Glm4MoeLiteConfig:
    """Return the configuration: one dense layer, then four of 24 experts, four of which a token chooses."""
    end = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    return Glm4MoeLiteConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=24,
        num_experts_per_tok=4,
        routed_scaling_factor=1.8,
        kv_lora_rank=128,
        q_lora_rank=128,
        qk_rope_head_dim=16,
        qk_nope_head_dim=48,
        v_head_dim=64,
        max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        pad_token_id=end[0],
        eos_token_id=end,
        bos_token_id=None,
    )


class Balanced(Run):
    """A run whose routers are kept from leaving experts without tokens."""

    def gather(self) -> None:
        """Move the gradients into the model, and the routers' biases by what their experts were given."""
        super().gather()
        replicas = [self.replicas.get() for _ in range(self.options.threads)]
        for replica in replicas:
            self.replicas.put(replica)
        for copies in zip(*map(routers, replicas), strict=True):
            load = sum((router.load for router in copies), torch.zeros(len(copies[0].weight)))
            if load.sum():
                copies[0].e_score_correction_bias += BALANCE_RATE * (load.mean() - load).sign()
            for router in copies:
                router.load.zero_()


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the router of every layer that has one."""
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def count(router: nn.Module, _inputs: object, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Add the tokens of a pass to the load of each expert."""
    router.load += torch.bincount(outputs[2].flatten(), minlength=len(router.load))


def main() -> None:
    """Train from the demo's tokenizer and text."""
    options = arguments(__doc__, CHECKPOINT)
    options.export.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, options.export / name)
    torch.set_num_threads(options.threads)
    run = Balanced(options, model_config)
    replicas = [run.replicas.get() for _ in range(options.threads)]
    for replica in replicas:
        for router in routers(replica):
            router.load = torch.zeros(len(router.weight))
            router.register_forward_hook(count)
        run.replicas.put(replica)
    finish(run)


if __name__ == "__main__":
    main()
