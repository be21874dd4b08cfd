"""The shipped definitions have the values that bundles were built with, however their files say it."""

from __future__ import annotations

import hashlib

import pytest

from glmexport.foundation.definition import names
from glmexport.foundation.recipe import RECIPES, open_recipe
from glmexport.foundation.target import TARGETS, open_target

#: SHA-256 of a target as it is written into a manifest. Change one together with the target's values, only then.
TARGET_DIGESTS = {
    "arm64": "ea6c3ce9724e42727e75b368be046e4aaa59a94abe056f8ba702d4afb3454964",
    "cuda": "a932ab54de8f153c8a738320d512d0ad937e4410b51f19bd753626b0c1309cb9",
    "directml": "4b2fd44c3397a98569c7e123017931a926a626f52fab1b41402dc7e333d6d37b",
    "openvino": "71849a24b6b1371fc5497154fa250ecdaef766808df3eca3affdcbb8c6db4e89",
    "qnn": "cbc6576d8633301f7d48c3223384ad4c97ae519a798d681159b638a5a22209f9",
    "trt-rtx": "ab353d00d05fa26745da2c03664e84950f3b13b4c80aa685bb7912653cb593c5",
    "wasm": "70f4c78e0025939affafa154b195b9d3d89833ea33be36ffca07d877734a494e",
    "webgpu": "92e2c2980f17dfee33d7b6a717d5d1115e4095583e28ca66f1634611723d11f1",
    "x86-avx2": "0dab65aa8d640dcc6e28a298453f838f08c02423c93ade33f2b841cbd887e4fb",
    "x86-avx512-vnni": "3527e86fe3fd2015372adcc712694f27d77a0cf44e49b07c43d4abce25cad6cd",
}
#: What ``Recipe.digest`` gives, which names the work that can be reused, without its prefix.
RECIPE_DIGESTS = {
    "fp32": "cbbd577bd53cb7445f93ce89d4e6c74afb924af8c543744164041261f4677e44",
    "rtn-w4g128": "c462fba36e30ca249eed0dde21ceacc85d3a4b0eba0892c96f7fbfc20ec8be7c",
    "rtn-w4g32": "9ef7edabf9589bc0332ab2f8029ec472bd30cb51060c614d4018ee7db260d9f3",
    "small": "773a437e4705e82b20ce27d5ed2d32b6ad31934fe645f60439a787cf4894d1a9",
    "stored": "1fdf28eb198664502510a26c4819dd591f643269242987ed4558a1db1a456087",
    "w4g128": "bde0343af47991b619daa52a685b40d0305dc3f536e2bb778894c881f3bad6dd",
    "w4g128-sym": "77eff6af03a2844cc8ff60d4b4842bd623d3add938c9c4f81887e4ec96abdb14",
    "w4g128-sym-head": "2b806c6da9ec934e20734f0205bc963ec96850daeecbbf661d54c8ab3593808f",
    "w4g32": "f955867b99a9d44f1bee4563ee5a39a3bc640d70eeb2fd570202c07f717d646b",
    "w4g32-sym": "2fa438c7b916e4cd2b5c8b24938842b236d1cbafa4644e75ce24e97ac4ca4d21",
    "w4g32-sym-head": "3d43c91dd891d49d448f4ca07f94bb7c02b3a1a2ed585c15b8d891e8725bd1ec",
    "w4g64": "ce670a25e7438766d24669815c0730b8e2a4bcdb42a18692a79d17f203b7d9c0",
    "w8g128": "69796b3464ccc25703e05e0ba8a8a7b26aaa5d09219f001e9952dac7f908117a",
}
SUMMARIES = {
    "fp32": "Full precision: every weight as fp32, for parity checks",
    "rtn-w4g128": "Baseline: 4-bit min-max round-to-nearest, group 128, 8-bit lm_head and embeddings",
    "rtn-w4g32": "Baseline: 4-bit min-max round-to-nearest, group 32, 8-bit lm_head and embeddings",
    "small": "About 3 bits a weight: 2, 4 and 8 bits mixed where each loses least",
    "stored": "Quantized checkpoints: the linears' stored codes as they are, 8-bit lm_head and embeddings",
    "w4g128": "4-bit asymmetric GPTQ, group 128, 8-bit lm_head and embeddings",
    "w4g128-sym": "4-bit symmetric GPTQ, group 128, 8-bit lm_head and embeddings",
    "w4g128-sym-head": "4-bit symmetric GPTQ, group 128, 8-bit lm_head without zero points, 8-bit embeddings",
    "w4g32": "4-bit asymmetric GPTQ, group 32, 8-bit lm_head and embeddings",
    "w4g32-sym": "4-bit symmetric GPTQ, group 32, 8-bit lm_head and embeddings",
    "w4g32-sym-head": "4-bit symmetric GPTQ, group 32, 8-bit lm_head without zero points, 8-bit embeddings",
    "w4g64": "4-bit asymmetric GPTQ, group 64, 8-bit lm_head and embeddings",
    "w8g128": "8-bit asymmetric GPTQ, group 128",
}


def test_every_shipped_definition_has_a_digest() -> None:
    assert [*TARGET_DIGESTS] == names(TARGETS)
    assert [*RECIPE_DIGESTS] == [*SUMMARIES] == names(RECIPES)


@pytest.mark.parametrize("name", TARGET_DIGESTS)
def test_target(name: str) -> None:
    assert hashlib.sha256(open_target(name).model_dump_json().encode()).hexdigest() == TARGET_DIGESTS[name]


@pytest.mark.parametrize("name", RECIPE_DIGESTS)
def test_recipe(name: str) -> None:
    recipe = open_recipe(name)
    assert recipe.digest() == f"sha256:{RECIPE_DIGESTS[name]}"
    assert recipe.summary == SUMMARIES[name]
