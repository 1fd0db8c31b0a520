"""The error of one full-size UNet call against PyTorch in f32, relative in L2, and the same of PyTorch's own bf16.

    cargo build --release --example unet
    python examples/peers/unet_error.py MODEL_FOLDER [size]

The folder is one of diffusers'.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file


def main():
    folder, size = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 256
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).eval()
    torch.manual_seed(1)
    sample = torch.randn(1, 4, size // 8, size // 8)
    context = torch.randn(2, 77, unet.config.cross_attention_dim)
    timestep = torch.tensor([481.0])
    with torch.no_grad():
        pair = torch.cat([sample, sample])
        want = unet(pair, timestep[0], context, return_dict=False)[0]
        half = unet.to(torch.bfloat16)(pair.bfloat16(), timestep[0], context.bfloat16(), return_dict=False)[0].float()
    error = lambda got: ((got - want).norm() / want.norm()).item()
    print(f"PyTorch bf16: {error(half):.2e}")
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "inputs.safetensors", Path(place) / "prediction.safetensors"
        save_file(dict(sample=sample, timestep=timestep, context=context), given)
        for dtype in ["f32", "bf16"]:
            subprocess.run(["target/release/examples/unet", folder, dtype, str(given), str(made)], check=True)
            print(f"sd-rs {dtype}: {error(load_file(made)['prediction']):.2e}")


if __name__ == "__main__":
    main()
