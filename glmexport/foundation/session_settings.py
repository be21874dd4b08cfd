"""Settings of ONNX Runtime that a file may choose: the allowed names, each with the values that it may have.

Settings come from strangers, in a bundle's manifest or in a target's file. ONNX Runtime takes any name, and some name
a library that it loads, a file that it overwrites or one that it reads. So what is not listed here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SWITCH = re.compile(r"[01]")
_COUNT = re.compile(r"[0-9]{1,9}")
_BYTES = re.compile(r"[0-9]{1,15}")

#: Entries of a session's configuration.
SESSION_ENTRIES: Mapping[str, re.Pattern[str]] = {
    "mlas.disable_kleidiai": _SWITCH,
    "mlas.qnbit.force_fp32": _SWITCH,
    "mlas.use_lut_gemm": _SWITCH,
    "session.disable_cpu_ep_fallback": _SWITCH,
    "session.disable_prepacking": _SWITCH,
    "session.dynamic_block_base": _COUNT,
    "session.enable_dq_matmulnbits_fusion": _SWITCH,
    "session.force_spinning_stop": _SWITCH,
    "session.inter_op.allow_spinning": _SWITCH,
    "session.intra_op.allow_spinning": _SWITCH,
    "session.intra_op.spin_duration_us": _COUNT,
    "session.prepack.enable_parallel": _SWITCH,
    "session.qdq_matmulnbits_accuracy_level": re.compile(r"[0-4]"),
    "session.qdq_matmulnbits_block_size": _COUNT,
    "session.set_denormal_as_zero": _SWITCH,
    "session.use_deterministic_compute": _SWITCH,
    "session.use_device_allocator_for_initializers": _SWITCH,
}

#: Options of each execution provider; one that is not here has none.
PROVIDER_OPTIONS: Mapping[str, Mapping[str, re.Pattern[str]]] = {
    "CUDAExecutionProvider": {
        "arena_extend_strategy": re.compile("kNextPowerOfTwo|kSameAsRequested"),
        "device_id": _COUNT,
        "enable_cuda_graph": _SWITCH,
        "gpu_mem_limit": _BYTES,
        "prefer_nhwc": _SWITCH,
        "sdpa_kernel": _COUNT,
        "use_tf32": _SWITCH,
    },
    "DmlExecutionProvider": {
        "device_filter": re.compile("gpu|npu|any"),
        "device_id": _COUNT,
        "performance_preference": re.compile("default|high_performance|minimum_power"),
    },
    "NvTensorRTRTXExecutionProvider": {
        "device_id": _COUNT,
        "enable_cuda_graph": _SWITCH,
        "nv_max_workspace_size": _BYTES,
    },
    "OpenVINOExecutionProvider": {
        "device_type": re.compile(r"(?:(?:AUTO|HETERO|MULTI):)?(?:CPU|GPU|NPU)(?:[.][0-9])?(?:,(?:CPU|GPU|NPU))*"),
        "num_of_threads": _COUNT,
        "num_streams": _COUNT,
        "precision": re.compile("FP32|FP16|ACCURACY"),
    },
    "QNNExecutionProvider": {
        "backend_type": re.compile("cpu|gpu|htp"),
        "device_id": _COUNT,
        "enable_htp_fp16_precision": _SWITCH,
        "htp_arch": _COUNT,
        "htp_performance_mode": re.compile(
            "burst|balanced|default|high_performance|high_power_saver|low_balanced|extreme_power_saver|low_power_saver"
            "|power_saver|sustained_high_performance"
        ),
        "soc_model": _COUNT,
        "vtcm_mb": _COUNT,
    },
    "WebGpuExecutionProvider": {
        "preferredLayout": re.compile("NCHW|NHWC"),
    },
}
_PROVIDER = re.compile("[A-Za-z0-9]{1,60}ExecutionProvider")


def check_session_entries(entries: Mapping[str, str]) -> None:
    """Refuse entries of a session's configuration that a file may not choose.

    Raises:
        ValueError: names the entry, and what is allowed.
    """
    _check(entries, SESSION_ENTRIES, "session.config")


def check_provider(name: str, options: Mapping[str, str]) -> None:
    """Refuse an execution provider, or options of it, that a file may not choose.

    Raises:
        ValueError: names the provider or the option, and what is allowed.
    """
    if not _PROVIDER.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an execution provider")
    _check(options, PROVIDER_OPTIONS.get(name, {}), f"{name}'s options")


def _check(given: Mapping[str, str], allowed: Mapping[str, re.Pattern[str]], where: str) -> None:
    for name, value in given.items():
        if name not in allowed:
            known = f"it may be one of {', '.join(allowed)}" if allowed else "there is none that may be set"
            raise ValueError(f"{name!r} may not be set in {where}; {known}")
        if not allowed[name].fullmatch(value):
            raise ValueError(f"{name!r} in {where} may not be {value!r}")
