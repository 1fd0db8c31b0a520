//! Every family is recognised from names and shapes, whatever its sizes, and refused by name where it is not supported.

use sd_rs::checkpoint::{Checkpoint, Detection, Family, Prediction, Variant, detect};

use super::build::{Sizes, Tensors, clip_l, ldm_unet, ldm_vae, open_clip, sd1, sd2};

fn detection(tensors: &Tensors) -> Detection {
    let file = tensors.file();
    detect(&Checkpoint::open(&file.path).unwrap())
}

fn of(names: &[(&str, &[usize])]) -> Tensors {
    let mut tensors = Tensors::default();
    for (name, shape) in names {
        tensors.add(*name, shape);
    }
    tensors
}

/// Detected as `family`, refused with a sentence that holds `words`.
#[track_caller]
fn refused(tensors: &Tensors, family: Family, words: &str) -> Detection {
    let detection = detection(tensors);
    assert_eq!(detection.family, family, "{:?}", detection.evidence);
    let refusal = detection.refusal().expect("is refused");
    assert!(refusal.contains(words), "{refusal}");
    detection
}

/// Detected as `family` by evidence that holds `words`, and fit to make pictures.
#[track_caller]
fn taken(tensors: &Tensors, family: Family, words: &str) -> Detection {
    let detection = detection(tensors);
    assert_eq!(detection.family, family, "{:?}", detection.evidence);
    assert_eq!(detection.refusal(), None);
    let evidence = detection.evidence.join("; ");
    assert!(evidence.contains(words), "{evidence}");
    detection
}

#[test]
fn sd1_in_all_spellings() {
    let full = sd1(&Sizes::sd1());
    let mut without_infix = full.clone();
    without_infix.rename(".text_model.", ".");
    let mut no_positions = full.clone();
    no_positions.remove("cond_stage_model.transformer.text_model.embeddings.position_ids");
    let mut float_positions = no_positions.clone();
    float_positions.add(
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        &[1, 77],
    );
    let mut averaged = full.clone();
    averaged.add(
        "model_ema.diffusion_modelinput_blocks00weight",
        &[320, 4, 3, 3],
    );
    for tensors in [full, without_infix, no_positions, float_positions, averaged] {
        let found = detection(&tensors);
        assert_eq!(found.family, Family::Sd1);
        assert_eq!(found.variant, Variant::Text2Image);
        assert_eq!(found.prediction, Some(Prediction::Epsilon));
        assert_eq!(found.refusal(), None);
        let places: Vec<_> = found.places.iter().map(|place| place.component).collect();
        assert_eq!(places, ["text_encoder", "unet", "vae"]);
        let text = found.structure.text.unwrap();
        assert_eq!(
            (text.width, text.layers, text.vocabulary, text.positions),
            (768, 12, 49408, 77)
        );
        let vae = found.structure.vae.unwrap();
        assert_eq!(
            (vae.latent_channels, vae.channels),
            (4, vec![128, 256, 512, 512])
        );
    }
}

#[test]
fn sizes_that_nobody_tried() {
    let odd = [
        (vec![48, 80], vec![1, 0], 1, 40),
        (vec![64], vec![2], 1, 24),
        (vec![32, 64, 96, 128, 160], vec![0, 1, 2, 1, 0], 3, 200),
        (vec![64, 64, 96, 128], vec![1, 1, 1, 0], 2, 1024),
    ];
    for (channels, depths, layers, context) in odd {
        let sizes = |linear| Sizes {
            channels: channels.clone(),
            depths: depths.clone(),
            layers,
            context,
            linear,
            ..Sizes::sd1()
        };
        // the text tower's spelling decides, also against the projections
        for linear in [false, true] {
            let one = detection(&sd1(&sizes(linear)));
            assert_eq!((one.family, one.refusal()), (Family::Sd1, None));
            let unet = one.structure.unet.unwrap();
            assert_eq!(unet.channels, channels);
            assert_eq!(
                unet.depths,
                depths.iter().map(|&d| vec![d; layers]).collect::<Vec<_>>()
            );
            assert_eq!(
                (unet.context, unet.linear, unet.mid_depth),
                (Some(context), Some(linear), 1)
            );
            let mut two = Tensors::default();
            ldm_unet(&mut two, "model.diffusion_model.", &sizes(linear));
            ldm_vae(&mut two, "first_stage_model.");
            open_clip(&mut two, "cond_stage_model.model.", context, 3);
            let two = detection(&two);
            assert_eq!((two.family, two.refusal()), (Family::Sd2, None));
        }
    }
}

#[test]
fn sd2_predicts_what_its_last_attention_tells() {
    let sizes = Sizes::sd2();
    for (bias, prediction) in [
        (0.02, Prediction::Epsilon),
        (0.089, Prediction::Epsilon),
        (0.0911, Prediction::V),
        (0.5, Prediction::V),
    ] {
        let found = detection(&sd2(&sizes, bias));
        assert_eq!(
            (found.family, found.prediction),
            (Family::Sd2, Some(prediction)),
            "{bias}"
        );
        assert!(
            found
                .evidence
                .iter()
                .any(|line| line.contains("output_blocks.11.1.")),
            "{:?}",
            found.evidence
        );
    }
    // two levels, one layer: the last attention is another block's
    let small = Sizes {
        channels: vec![48, 80],
        depths: vec![1, 1],
        layers: 1,
        context: 40,
        ..Sizes::sd2()
    };
    assert_eq!(detection(&sd2(&small, 0.3)).prediction, Some(Prediction::V));
    assert_eq!(
        detection(&sd2(&small, 0.0)).prediction,
        Some(Prediction::Epsilon)
    );
    // words win over the rule
    let mut said = sd2(&sizes, 0.02);
    said.metadata("modelspec.prediction_type", "v");
    assert_eq!(detection(&said).prediction, Some(Prediction::V));
    let mut said = sd2(&sizes, 0.3);
    said.metadata("modelspec.prediction_type", "epsilon");
    assert_eq!(detection(&said).prediction, Some(Prediction::Epsilon));
    let mut key = sd1(&Sizes::sd1());
    key.add("v_pred", &[]);
    assert_eq!(detection(&key).prediction, Some(Prediction::V));
}

#[test]
fn the_rule_reads_every_float_type() {
    let name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias";
    let values: Vec<f32> = (0..320)
        .map(|i| if i % 2 == 0 { 0.25 } else { -0.25 })
        .collect();
    let types: [(&'static str, Vec<u8>); 3] = [
        ("F32", values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        (
            "F64",
            values
                .iter()
                .flat_map(|&v| f64::from(v).to_le_bytes())
                .collect(),
        ),
        (
            "BF16",
            values
                .iter()
                .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
                .collect(),
        ),
    ];
    for (dtype, bytes) in types {
        let mut tensors = sd2(&Sizes::sd2(), 0.0);
        tensors.remove(name);
        tensors.add_bytes(name, dtype, &[320], bytes);
        let found = detection(&tensors);
        assert_eq!(found.prediction, Some(Prediction::V), "{dtype}");
        assert!(
            found
                .evidence
                .iter()
                .any(|line| line.contains("deviate by 0.2500")),
            "{:?}",
            found.evidence
        );
    }
}

#[test]
fn channels_tell_the_variant() {
    let with = |input| Sizes {
        input,
        ..Sizes::sd1()
    };
    let found = taken(&sd1(&with(9)), Family::Sd1, "inpainting");
    assert_eq!(found.variant, Variant::Inpainting);
    let found = taken(&sd1(&with(8)), Family::Sd1, "pix2pix");
    assert_eq!(found.variant, Variant::Pix2Pix);
    let mut posed = sd1(&with(8));
    posed.add("cc_projection.weight", &[768, 772]);
    assert_eq!(
        refused(&posed, Family::Sd1, "Zero123").variant,
        Variant::Zero123
    );
    let mut depth = sd2(
        &Sizes {
            input: 5,
            ..Sizes::sd2()
        },
        0.4,
    );
    depth.add(
        "depth_model.model.pretrained.model.cls_token",
        &[1, 1, 1024],
    );
    let found = refused(&depth, Family::Sd2, "depth");
    assert_eq!(
        (found.variant, found.prediction),
        (Variant::Depth, Some(Prediction::Epsilon))
    );
    let inpainting = taken(
        &sd2(
            &Sizes {
                input: 9,
                ..Sizes::sd2()
            },
            0.4,
        ),
        Family::Sd2,
        "inpainting",
    );
    assert_eq!(inpainting.prediction, Some(Prediction::Epsilon));
    assert_eq!(
        refused(&sd1(&with(6)), Family::Sd1, "6 channels").variant,
        Variant::Other(6)
    );
}

#[test]
fn sdxl_and_its_relatives() {
    let whole = |sizes: &Sizes| {
        let mut tensors = Tensors::default();
        ldm_unet(&mut tensors, "model.diffusion_model.", sizes);
        tensors.add("model.diffusion_model.label_emb.0.0.weight", &[1280, 2816]);
        ldm_vae(&mut tensors, "first_stage_model.");
        clip_l(
            &mut tensors,
            "conditioner.embedders.0.transformer.text_model.",
            768,
        );
        open_clip(&mut tensors, "conditioner.embedders.1.model.", 1280, 32);
        tensors
    };
    let base = taken(
        &whole(&Sizes::sdxl()),
        Family::Sdxl,
        "key `conditioner.embedders.1.model.",
    );
    assert_eq!(base.prediction, Some(Prediction::Epsilon));
    let mut velocity = whole(&Sizes::sdxl());
    velocity.add("v_pred", &[1]);
    let velocity = taken(&velocity, Family::Sdxl, "key `v_pred`");
    assert_eq!(velocity.prediction, Some(Prediction::V));
    let places: Vec<_> = base.places.iter().map(|place| place.component).collect();
    assert_eq!(places, ["text_encoder", "text_encoder_2", "unet", "vae"]);
    let inpainting = Sizes {
        input: 9,
        ..Sizes::sdxl()
    };
    assert_eq!(
        taken(&whole(&inpainting), Family::Sdxl, "inpainting").variant,
        Variant::Inpainting
    );
    let depths = |depths: &[usize], mid_depth| Sizes {
        depths: depths.to_vec(),
        mid_depth,
        ..Sizes::sdxl()
    };
    let seen = "transformer blocks on the way down";
    taken(&whole(&depths(&[0, 2, 4], 0)), Family::Ssd1b, seen);
    taken(&whole(&depths(&[0, 1, 2], 0)), Family::Vega, seen);
    for last in [5, 6] {
        let koala = Sizes {
            layers: 1,
            ..depths(&[0, 2, last], 0)
        };
        taken(&whole(&koala), Family::Koala, seen);
    }
    let mut unet = Tensors::default();
    ldm_unet(&mut unet, "", &Sizes::sdxl());
    unet.add("label_emb.0.0.weight", &[1280, 2816]);
    refused(&unet, Family::Sdxl, "the UNet alone of an SDXL base");
    let mut refiner = Tensors::default();
    let sizes = Sizes {
        channels: vec![384, 768, 1536, 1536],
        depths: vec![0, 4, 4, 0],
        context: 1280,
        ..Sizes::sdxl()
    };
    ldm_unet(&mut refiner, "model.diffusion_model.", &sizes);
    refiner.add("model.diffusion_model.label_emb.0.0.weight", &[1536, 2560]);
    refused(
        &refiner,
        Family::SdxlRefiner,
        "the UNet alone of an SDXL refiner",
    );
    open_clip(&mut refiner, "conditioner.embedders.0.model.", 1280, 32);
    refused(&refiner, Family::SdxlRefiner, "its vae is missing");
    ldm_vae(&mut refiner, "first_stage_model.");
    taken(
        &refiner,
        Family::SdxlRefiner,
        "key `conditioner.embedders.0.model.",
    );
    let mut upscaler = Tensors::default();
    ldm_unet(
        &mut upscaler,
        "model.diffusion_model.",
        &Sizes {
            input: 7,
            ..Sizes::sd2()
        },
    );
    upscaler.add("model.diffusion_model.label_emb.weight", &[1000, 1024]);
    refused(&upscaler, Family::X4Upscaler, "x4 upscaler");
    let mut unclip = sd2(&Sizes::sd2(), 0.3);
    unclip.add("model.diffusion_model.label_emb.0.0.weight", &[1280, 2048]);
    unclip.add("embedder.model.ln_final.weight", &[1024]);
    refused(&unclip, Family::UnClip, "unCLIP");
    let mut video = Tensors::default();
    ldm_unet(
        &mut video,
        "model.diffusion_model.",
        &Sizes {
            input: 8,
            ..Sizes::sd2()
        },
    );
    video.add("model.diffusion_model.label_emb.0.0.weight", &[1280, 768]);
    video.add(
        "model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight",
        &[320],
    );
    refused(&video, Family::Svd, "Stable Video Diffusion");
}

#[test]
fn transformers() {
    let prefixed = |prefix: &str, names: &[&str]| {
        let mut tensors = Tensors::default();
        for name in names {
            tensors.add(format!("{prefix}{name}"), &[64, 64]);
        }
        tensors
    };
    for prefix in ["model.diffusion_model.", "", "transformer."] {
        let case = |names: &[&str], family, words| refused(&prefixed(prefix, names), family, words);
        let flux = [
            "double_blocks.0.img_attn.norm.key_norm.scale",
            "img_in.weight",
        ];
        let dev = [flux[0], flux[1], "guidance_in.in_layer.weight"];
        case(&flux, Family::Flux1, "a FLUX.1 checkpoint (schnell)");
        case(&dev, Family::Flux1, "a FLUX.1 checkpoint (dev)");
        case(
            &[flux[0], "single_stream_modulation.lin.weight"],
            Family::Flux2,
            "FLUX.2",
        );
        case(
            &[flux[0], "distilled_guidance_layer.in_proj.weight"],
            Family::Chroma,
            "Chroma",
        );
        let sd3 = "joint_blocks.0.context_block.adaLN_modulation.1.bias";
        case(
            &[sd3, "joint_blocks.0.x_block.attn.qkv.weight"],
            Family::Sd3,
            "a Stable Diffusion 3 checkpoint",
        );
        let norm = "joint_blocks.0.x_block.attn.ln_q.weight";
        case(
            &[sd3, norm, "joint_blocks.0.x_block.attn2.ln_q.weight"],
            Family::Sd35,
            "3.5 checkpoint (medium)",
        );
        case(
            &[sd3, norm, "joint_blocks.37.x_block.attn.qkv.weight"],
            Family::Sd35,
            "3.5 checkpoint (large)",
        );
    }
}

#[test]
fn adapters_and_parts() {
    let w: &[usize] = &[4, 4];
    type Case<'a> = (&'a [(&'a str, &'a [usize])], Family, &'a str);
    let cases: &[Case<'_>] = &[
        (
            &[
                (
                    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
                    w,
                ),
                ("lora_unet_down_blocks_0_attentions_0_proj_in.alpha", &[]),
            ],
            Family::Lora,
            "this is a LoRA (key `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`), not a base model; give a base model with --model, and the LoRA with --lora",
        ),
        (
            &[("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", w)],
            Family::Lora,
            "a LoRA",
        ),
        (
            &[
                (
                    "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",
                    w,
                ),
                ("transformer.context_embedder.lora_A.weight", w),
            ],
            Family::Lora,
            "a LoRA",
        ),
        (
            &[(
                "unet.mid_block.attentions.0.processor.to_q_lora.down.weight",
                w,
            )],
            Family::Lora,
            "a LoRA",
        ),
        (
            &[("lora_unet_x.hada_w1_a", w)],
            Family::Lora,
            "a LoRA (LoHa)",
        ),
        (&[("lora_unet_x.lokr_w1", w)], Family::Lora, "a LoRA (LoKr)"),
        (
            &[("lora_te_text_model_encoder_layers_0_mlp_fc1.diff", w)],
            Family::Lora,
            "a LoRA (text encoder only)",
        ),
        (
            &[
                ("control_model.input_blocks.0.0.weight", &[320, 4, 3, 3]),
                ("control_model.input_hint_block.0.weight", &[16, 3, 3, 3]),
            ],
            Family::ControlNet,
            "a ControlNet",
        ),
        (
            &[
                ("input_blocks.0.0.weight", &[320, 4, 3, 3]),
                ("input_hint_block.0.weight", &[16, 3, 3, 3]),
            ],
            Family::ControlNet,
            "a ControlNet",
        ),
        (
            &[
                ("conv_in.weight", &[320, 4, 3, 3]),
                ("down_blocks.0.resnets.0.conv1.weight", &[320, 320, 3, 3]),
                ("controlnet_cond_embedding.conv_in.weight", &[16, 3, 3, 3]),
            ],
            Family::ControlNet,
            "a ControlNet",
        ),
        (
            &[(
                "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight",
                w,
            )],
            Family::ControlNet,
            "a ControlNet-LLLite",
        ),
        (
            &[("lora_controlnet", &[]), ("input_blocks.0.0.up", w)],
            Family::ControlNet,
            "a Control-LoRA",
        ),
        (
            &[
                ("conv_in.weight", &[320, 192, 3, 3]),
                ("body.0.block1.weight", &[320, 320, 3, 3]),
                ("body.0.block2.weight", &[320, 320, 1, 1]),
            ],
            Family::T2iAdapter,
            "a T2I-Adapter",
        ),
        (
            &[
                ("image_proj.proj.weight", w),
                ("ip_adapter.1.to_k_ip.weight", w),
            ],
            Family::IpAdapter,
            "an IP-Adapter",
        ),
        (
            &[("emb_params", &[3, 768])],
            Family::Embedding,
            "a textual-inversion embedding",
        ),
        (
            &[("string_to_param.*", &[3, 768])],
            Family::Embedding,
            "a textual-inversion embedding",
        ),
        (
            &[("clip_l", &[3, 768]), ("clip_g", &[3, 1280])],
            Family::Embedding,
            "a textual-inversion embedding",
        ),
        (
            &[("<cat-toy>", &[768])],
            Family::Embedding,
            "a textual-inversion embedding",
        ),
        (
            &[
                ("768.0.linear.0.weight", &[768, 768]),
                ("768.1.linear.0.weight", &[768, 768]),
            ],
            Family::Hypernetwork,
            "a hypernetwork",
        ),
        (
            &[
                ("conv_first.weight", &[64, 3, 3, 3]),
                ("body.0.rdb1.conv1.weight", &[32, 64, 3, 3]),
            ],
            Family::Upscaler,
            "(Real-ESRGAN)",
        ),
        (
            &[
                ("model.0.weight", &[64, 3, 3, 3]),
                ("model.1.sub.0.RDB1.conv1.0.weight", &[32, 64, 3, 3]),
            ],
            Family::Upscaler,
            "(ESRGAN)",
        ),
        (
            &[("body.0.weight", &[64, 3, 3, 3]), ("body.1.weight", &[64])],
            Family::Upscaler,
            "(compact)",
        ),
        (
            &[
                ("decoder.layers.0.weight", &[64, 4, 3, 3]),
                ("decoder.layers.3.conv.0.weight", &[64, 64, 3, 3]),
            ],
            Family::Taesd,
            "TAESD",
        ),
        (
            &[
                ("1.weight", &[64, 4, 3, 3]),
                ("3.conv.0.weight", &[64, 64, 3, 3]),
            ],
            Family::Taesd,
            "TAESD",
        ),
        (
            &[
                ("0.weight", &[64, 3, 3, 3]),
                ("1.conv.0.weight", &[64, 64, 3, 3]),
            ],
            Family::Taesd,
            "TAESD",
        ),
        (
            &[
                ("encoder.block.0.layer.0.SelfAttention.q.weight", w),
                ("shared.weight", w),
            ],
            Family::T5,
            "a T5 text encoder alone",
        ),
        (
            &[(
                "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",
                &[320],
            )],
            Family::MotionModule,
            "AnimateDiff",
        ),
        (
            &[(
                "model_ema.diffusion_modelinput_blocks00weight",
                &[320, 4, 3, 3],
            )],
            Family::Unknown,
            "only the averaged copy",
        ),
        (
            &[
                ("layers.0.self_attn.q_proj.weight", w),
                ("lm_head.weight", w),
            ],
            Family::Unknown,
            "no kind of model that is known here (names such as `layers.0.self_attn.q_proj.weight`",
        ),
    ];
    for (names, family, words) in cases {
        refused(&of(names), *family, words);
    }
    let mut vae = Tensors::default();
    ldm_vae(&mut vae, "");
    refused(&vae, Family::Vae, "a VAE alone");
    vae.rename("encoder.", "first_stage_model.encoder.")
        .rename("decoder.", "first_stage_model.decoder.");
    refused(&vae, Family::Vae, "a VAE alone");
    for prefix in ["", "text_model."] {
        let mut tower = Tensors::default();
        clip_l(&mut tower, prefix, 768);
        let found = refused(&tower, Family::TextEncoder, "a CLIP text encoder alone");
        assert_eq!(found.structure.text.unwrap().layers, 12);
    }
    let mut tower = Tensors::default();
    open_clip(&mut tower, "", 1024, 24);
    refused(&tower, Family::TextEncoder, "a CLIP text encoder alone");
}

#[test]
fn parts_of_stable_diffusion() {
    for (sizes, family, words) in [
        (
            Sizes::sd1(),
            Family::Sd1,
            "the UNet alone of a Stable Diffusion 1",
        ),
        (
            Sizes::sd2(),
            Family::Sd2,
            "the UNet alone of a Stable Diffusion 2",
        ),
    ] {
        for prefix in ["", "model.diffusion_model.", "diffusion_model."] {
            let mut unet = Tensors::default();
            ldm_unet(&mut unet, prefix, &sizes);
            let found = refused(&unet, family, words);
            assert_eq!(found.missing, ["text_encoder", "vae"]);
        }
    }
    let mut unet = of(&[
        ("conv_in.weight", &[48, 4, 3, 3]),
        ("conv_out.weight", &[4, 48, 3, 3]),
    ]);
    unet.add("down_blocks.0.resnets.0.conv1.weight", &[48, 48, 3, 3]);
    unet.add("down_blocks.0.attentions.0.proj_in.weight", &[48, 48]);
    refused(&unet, Family::Sd2, "the UNet alone");
    unet.add("add_embedding.linear_1.weight", &[1280, 2816]);
    refused(&unet, Family::Sdxl, "SDXL");
    let mut no_vae = sd1(&Sizes::sd1());
    no_vae.remove("first_stage_model.");
    refused(&no_vae, Family::Sd1, "its vae is missing");
    let mut bert = Tensors::default();
    ldm_unet(&mut bert, "model.diffusion_model.", &Sizes::sd1());
    bert.add(
        "cond_stage_model.transformer.token_emb.weight",
        &[30522, 1280],
    );
    refused(&bert, Family::Unknown, "not CLIP");
}
