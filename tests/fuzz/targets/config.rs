//! Every reader of a folder's small files: configs of networks and schedulers, tokenizers. The first byte chooses which.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use sd_models::{clip, flux, mmdit, t5, unet, vae};
use sd_rs::sampling::{self, SchedulerConfig};
use sd_rs::text::{ClipTokenizer, T5Tokenizer};

fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = PathBuf::from(format!("/dev/shm/sd-rs-fuzz-{}", std::process::id()));
        let _ = std::fs::create_dir_all(&folder);
        folder
    })
}

/// The only file in the folder.
fn with_file(name: &str, bytes: &[u8], read: impl Fn(&PathBuf)) {
    let path = folder().join(name);
    if std::fs::write(&path, bytes).is_ok() {
        read(folder());
    }
    let _ = std::fs::remove_file(path);
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, bytes)) = bytes.split_first() else {
        return;
    };
    match kind {
        b'c' => {
            return with_file("tokenizer.json", bytes, |folder| {
                if let Ok(tokenizer) = ClipTokenizer::from_folder(folder) {
                    let _ = tokenizer.encode("a fox, \u{1f98a} 12");
                }
            });
        }
        b't' => {
            return with_file("tokenizer.json", bytes, |folder| {
                if let Ok(tokenizer) = T5Tokenizer::from_folder(folder) {
                    let _ = tokenizer.encode("a fox, \u{1f98a} \u{fb01}");
                }
            });
        }
        b'p' => {
            return with_file("spiece.model", bytes, |folder| {
                if let Ok(tokenizer) = T5Tokenizer::from_folder(folder) {
                    let _ = tokenizer.encode("a fox, \u{1f98a} \u{fb01}");
                }
            });
        }
        _ => {}
    }
    let Ok(value) = serde_json::from_slice(bytes) else {
        return;
    };
    let _ = unet::Config::from_json(&value).map(|c| (c.context_width(), c.size_multiple()));
    let _ = vae::Config::from_json(&value).map(|c| c.scale());
    let _ = clip::Config::from_json(&value);
    let _ = t5::Config::from_json(&value);
    let _ = mmdit::Config::from_json(&value);
    let _ = flux::Config::from_json(&value).map(|c| c.in_channels());
    if let Ok(config) = SchedulerConfig::from_json(&value) {
        let config = config.corrected_for_stable_diffusion();
        // the work grows with the training's timesteps, which nobody sets to millions
        if config.num_train_timesteps <= 2000 {
            let _ = sampling::diffusers(&config, 5, None);
            let _ = sampling::NoiseSchedule::new(&config);
        }
    }
});
