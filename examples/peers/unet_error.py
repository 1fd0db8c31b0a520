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
    given = dict(sample=sample, timestep=timestep, context=context)
    with torch.no_grad():
        beside = {}
        if unet.config.addition_embed_type == "text_time":
            width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            beside = dict(text_embeds=torch.randn(2, width), time_ids=torch.tensor([[size, size, 0.0, 0.0, size, size]] * 2))
            numbers = unet.add_time_proj(beside["time_ids"].flatten()).reshape(2, -1)
            given["added"] = torch.cat([beside["text_embeds"], numbers], 1)
        pair = torch.cat([sample, sample])
        want = unet(pair, timestep[0], context, added_cond_kwargs=beside, return_dict=False)[0]
        half = unet.to(torch.bfloat16)(pair.bfloat16(), timestep[0], context.bfloat16(), added_cond_kwargs=beside, return_dict=False)[0].float()
    error = lambda got: ((got - want).norm() / want.norm()).item()
    print(f"PyTorch bf16: {error(half):.2e}")
    with tempfile.TemporaryDirectory() as place:
        asked, made = Path(place) / "inputs.safetensors", Path(place) / "prediction.safetensors"
        save_file(given, asked)
        for dtype in ["f32", "bf16"]:
            subprocess.run(["target/release/examples/unet", folder, dtype, str(asked), str(made)], check=True)
            print(f"sd-rs {dtype}: {error(load_file(made)['prediction']):.2e}")


if __name__ == "__main__":
    main()
