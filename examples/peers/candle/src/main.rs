//! candle-transformers' own Stable Diffusion 1.5 UNet at 256×256, batch 2 (guidance), f32: seconds a call.
//! Usage: candle-peer [SIZE] [STEPS]
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::stable_diffusion::{StableDiffusionConfig, unet_2d};

fn main() -> candle_core::Result<()> {
    let mut args = std::env::args().skip(1).filter_map(|a| a.parse::<usize>().ok());
    let (size, steps) = (args.next().unwrap_or(256), args.next().unwrap_or(3));
    let device = Device::Cpu;
    let block = |out_channels, use_cross_attn, attention_head_dim| unet_2d::BlockConfig { out_channels, use_cross_attn, attention_head_dim };
    let config = unet_2d::UNet2DConditionModelConfig {
        blocks: vec![block(320, Some(1), 8), block(640, Some(1), 8), block(1280, Some(1), 8), block(1280, None, 8)],
        cross_attention_dim: 768,
        ..Default::default()
    };
    let _ = StableDiffusionConfig::v1_5(None, None, None);
    let weights = VarBuilder::zeros(DType::F32, &device);
    let unet = unet_2d::UNet2DConditionModel::new(weights, 4, 4, false, config)?;
    let sample = Tensor::randn(0f32, 1.0, (2, 4, size / 8, size / 8), &device)?;
    let context = Tensor::randn(0f32, 1.0, (2, 77, 768), &device)?;
    for i in 0..=steps {
        let start = std::time::Instant::now();
        unet.forward(&sample, 500.0, &context)?;
        println!("{} {:.3}", if i == 0 { "warm-up" } else { "step" }, start.elapsed().as_secs_f64());
    }
    Ok(())
}
