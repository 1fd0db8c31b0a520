//! A model file of these bytes, looked at as `inspect` and `generate` do before they compute.

use std::path::PathBuf;
use std::sync::OnceLock;

use sd_rs::checkpoint::{Checkpoint, detect};
use sd_rs::pipeline::Coverage;
use sd_rs::spec::{ModelSpec, Others};

/// A file in memory, one a process.
fn place(ending: &str) -> &'static PathBuf {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let name = format!("sd-rs-fuzz-{}.{ending}", std::process::id());
        PathBuf::from("/dev/shm").join(name)
    })
}

/// Opens the file and goes as far as it lets.
pub fn look(bytes: &[u8], ending: &str) {
    let path = place(ending);
    if std::fs::write(path, bytes).is_err() {
        return;
    }
    let Ok(checkpoint) = Checkpoint::open(path) else {
        return;
    };
    let detection = detect(&checkpoint);
    let _ = (detection.title(), detection.refusal());
    if let Some(tensors) = checkpoint.single() {
        for name in tensors.names().take(64) {
            let _ = tensors.bytes(name);
        }
    }
    if let Ok(spec) = ModelSpec::read_any(&checkpoint, &detection, Others::default()) {
        let _ = Coverage::of(&checkpoint, &spec);
    }
}
