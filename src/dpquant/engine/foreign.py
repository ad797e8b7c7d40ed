# SPDX-License-Identifier: Apache-2.0
"""Refuses weights that another library has quantized: their values are codes, which dpquant cannot read."""

from torch import nn

from dpquant.errors import ModelError

_LIBRARIES = ("auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "gptqmodel", "hqq", "optimum.quanto", "torchao")
_QUANTIZED_BY_TORCH = ("torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.nn.quantized")


def refuse_foreign_codes(model: nn.Module) -> None:
    """Check that no library has quantized the model's weights: by the homes of modules and tensors, and by types.

    Raises:
      ModelError: one has, with the way out.
    Privacy: reads no data.
    """
    for path, module in model.named_modules():
        own = [*module.parameters(recurse=False)]
        kinds = [type(module), *(type(tensor) for p in own for tensor in (p, p.data))]
        codes = any(not p.dtype.is_floating_point for p in own)
        if codes or any(_is_foreign(kind.__module__) for kind in kinds):
            raise ModelError(
                f"Expected the model's weights in float32; got {path or 'the model'} ({type(module).__name__}), whose "
                "weights another library has quantized. dpquant quantizes float32 weights itself, layer by layer and "
                "step by step. Load the model without quantization_config, or call its dequantize(), then .float()."
            )


def _is_foreign(home: str) -> bool:
    """Return whether a type of this module path is a quantizing library's."""
    return any(home == name or home.startswith(f"{name}.") for name in (*_LIBRARIES, *_QUANTIZED_BY_TORCH))
