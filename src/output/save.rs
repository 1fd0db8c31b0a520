//! Where pictures and latents go: names, what is asked before the work begins, and the writing itself.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use super::file::{self, Existing};
use super::{Image, Parameters, png};
use crate::error::{Error, Result};

/// The name of a picture when none is given.
pub const DEFAULT_NAME: &str = "sd-rs-{seed}.png";

/// The name that means standard output.
const STDOUT: &str = "-";

/// One picture's place among those of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target<'a> {
    /// `--output`: a file name in which `{seed}` and `{n}` (from 1) are replaced, or `-` for standard output.
    ///
    /// Without a placeholder, later pictures of a run are called `name-2.png`, `name-3.png` … The default name takes a number where
    /// it is taken; any other is refused then.
    pub template: &'a str,
    /// The picture's seed.
    pub seed: u64,
    /// The picture's place in the run, from 0.
    pub index: usize,
    /// Pictures of the run.
    pub count: usize,
    /// `--overwrite`.
    pub overwrite: bool,
}

impl Target<'_> {
    /// The file's name; none for standard output.
    pub fn path(&self) -> Option<PathBuf> {
        (self.template != STDOUT).then(|| expand(self.template, self.seed, self.index))
    }

    /// Makes sure, when the seeds are known and before anything is computed, that this picture can be written.
    ///
    /// # Errors
    /// [`Error::Usage`] for several pictures on standard output; else those of [`check_target`].
    pub fn check(&self) -> Result<()> {
        match self.path() {
            Some(path) => file::check(&path, existing(self.template, self.overwrite)),
            None if self.count > 1 => Err(Error::Usage(format!(
                "standard output takes one picture, not {}; name files with --output FILE",
                self.count
            ))),
            None => Ok(()),
        }
    }
}

/// Fails, before a model is opened, where `--output` and `--save-latents` cannot serve. Sweeps what killed runs left behind.
///
/// Names that hold the seed are known only later: [`Target::check`].
///
/// # Errors
/// [`Error::Usage`] for a name of another picture format and for a terminal as standard output. [`Error::Disk`] when the folder is
/// missing, is no folder or cannot be written to, when the path is a folder, and when the file exists and may not be replaced.
pub fn check_target(template: &str, latents: Option<&Path>, overwrite: bool) -> Result<()> {
    if let Some(path) = latents {
        file::check(path, latents_existing(overwrite))?;
    }
    if template == STDOUT {
        return refuse_terminal();
    }
    refuse_other_format(template)?;
    let path = Path::new(template);
    if has_placeholder(&file::folder_of(path).to_string_lossy()) {
        return Ok(());
    }
    file::sweep(file::folder_of(path));
    // A name with a placeholder is not final, so that a file of that very name says nothing.
    let existing = if has_placeholder(template) {
        Existing::Number
    } else {
        existing(template, overwrite)
    };
    file::check(path, existing)
}

/// Writes a picture with its texts and tells where it went; nowhere with a name on standard output.
///
/// `parameters` is what A1111 and its readers understand, `request` what this program would need to make it again.
///
/// # Errors
/// [`Error::Disk`] when it cannot be written; then nothing is left behind.
pub fn save(
    image: &Image,
    target: &Target<'_>,
    parameters: &Parameters,
    request: &serde_json::Value,
) -> Result<Option<PathBuf>> {
    let bytes = png::encode(image, &parameters.print(), Some(request))?;
    let Some(path) = target.path() else {
        write_stdout(&bytes)?;
        return Ok(None);
    };
    file::write(&path, &bytes, existing(target.template, target.overwrite)).map(Some)
}

/// Fails, before the work begins, where a picture that is called `path` (`-`: standard output) could not be written.
///
/// # Errors
/// As [`check_target`].
pub fn check_file(path: &Path, overwrite: bool) -> Result<()> {
    if path == Path::new(STDOUT) {
        return refuse_terminal();
    }
    refuse_other_format(&path.to_string_lossy())?;
    file::check(path, latents_existing(overwrite))
}

/// Writes the bytes of a file, whole or not at all, or those of standard output; whether a file came of it.
///
/// # Errors
/// [`Error::Disk`] when it cannot be written, or is there and may not be replaced.
pub fn save_bytes(path: &Path, bytes: &[u8], overwrite: bool) -> Result<bool> {
    if path == Path::new(STDOUT) {
        write_stdout(bytes)?;
        return Ok(false);
    }
    file::write(path, bytes, latents_existing(overwrite))?;
    Ok(true)
}

fn write_stdout(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|source| Error::disk("standard output", "write", source))
}

/// Writes latents as safetensors: key `latents`, f32, `shape` is `[n, c, h, w]`.
///
/// # Errors
/// [`Error::Usage`] when the values do not fit the shape; [`Error::Disk`] when the file cannot be written.
pub fn save_latents(path: &Path, latents: &[f32], shape: &[usize], overwrite: bool) -> Result<()> {
    let bytes: Vec<u8> = latents
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let misfit = |source| {
        let count = latents.len();
        Error::Usage(format!(
            "{count} latents do not fit the shape {shape:?}: {source}"
        ))
    };
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &bytes)
            .map_err(misfit)?;
    let serialized = safetensors::serialize([("latents", view)], None).map_err(misfit)?;
    file::write(path, &serialized, latents_existing(overwrite))?;
    Ok(())
}

/// What becomes of a picture of that name.
fn existing(template: &str, overwrite: bool) -> Existing {
    match template {
        _ if overwrite => Existing::Overwrite,
        DEFAULT_NAME => Existing::Number,
        _ => Existing::Refuse,
    }
}

/// What becomes of latents of that name.
fn latents_existing(overwrite: bool) -> Existing {
    if overwrite {
        Existing::Overwrite
    } else {
        Existing::Refuse
    }
}

fn has_placeholder(template: &str) -> bool {
    template.contains("{seed}") || template.contains("{n}")
}

/// The name of a picture, see [`Target::template`].
fn expand(template: &str, seed: u64, index: usize) -> PathBuf {
    let n = index.saturating_add(1);
    if has_placeholder(template) {
        let name = template.replace("{seed}", &seed.to_string());
        return name.replace("{n}", &n.to_string()).into();
    }
    file::numbered(Path::new(template), n)
}

fn refuse_terminal() -> Result<()> {
    if io::stdout().is_terminal() {
        return Err(Error::Usage(
            "a picture is not for a terminal; redirect standard output or name a file with --output FILE".to_owned(),
        ));
    }
    Ok(())
}

/// Refuses names that promise another format than PNG.
fn refuse_other_format(template: &str) -> Result<()> {
    const OTHERS: [&str; 10] = [
        "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jxl",
    ];
    let extension = Path::new(template).extension().unwrap_or_default();
    let extension = extension.to_string_lossy().to_lowercase();
    if OTHERS.contains(&extension.as_str()) {
        return Err(Error::Usage(format!(
            "pictures are written as PNG, but --output {template} ends in .{extension}; end it in .png"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn message(result: Result<impl std::fmt::Debug>) -> String {
        result.unwrap_err().to_string()
    }

    fn target(template: &str) -> Target<'_> {
        Target {
            template,
            seed: 7,
            index: 0,
            count: 1,
            overwrite: false,
        }
    }

    #[test]
    fn names_are_filled_in() {
        let name = |template, index| {
            let path = Target {
                index,
                ..target(template)
            }
            .path();
            path.unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!(name(DEFAULT_NAME, 2), "sd-rs-7.png");
        assert_eq!(name("a/{n}-{seed}-{n}{x}.png", 2), "a/3-7-3{x}.png");
        assert_eq!(name("a.b/c.png", 0), "a.b/c.png");
        assert_eq!(name("a.b/c.png", 1), "a.b/c-2.png");
        assert_eq!(name("a.b/c", 1), "a.b/c-2");
        assert_eq!(target("-").path(), None);
    }

    #[test]
    fn only_the_default_name_takes_a_number() {
        assert_eq!(existing(DEFAULT_NAME, false), Existing::Number);
        assert_eq!(existing(DEFAULT_NAME, true), Existing::Overwrite);
        assert_eq!(existing("{seed}.png", false), Existing::Refuse);
        assert_eq!(existing("x.png", true), Existing::Overwrite);
    }

    #[test]
    fn a_picture_is_saved_with_its_texts() {
        let folder = tempfile::tempdir().unwrap();
        let template = folder
            .path()
            .join("{seed}.png")
            .to_str()
            .unwrap()
            .to_owned();
        let image = Image::from_planar(&[0.5; 12], 2, 2).unwrap();
        let parameters = Parameters {
            prompt: "fox".to_owned(),
            seed: Some(7),
            ..Parameters::default()
        };
        let request = serde_json::json!({"seed": 7});
        target(&template).check().unwrap();
        let path = save(&image, &target(&template), &parameters, &request).unwrap();
        assert_eq!(path, Some(folder.path().join("7.png")));
        let text = png::read_text(&path.unwrap()).unwrap();
        assert_eq!(text.get(png::PARAMETERS), Some("fox\nSeed: 7"));
        assert_eq!(text.get(png::REQUEST), Some("{\"seed\":7}"));
        assert!(message(target(&template).check()).contains("--overwrite"));
        assert!(
            message(save(&image, &target(&template), &parameters, &request))
                .contains("--overwrite")
        );
    }

    #[test]
    fn flags_are_checked_before_a_model_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let to = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let check = |name: &str, overwrite| check_target(&to(name), None, overwrite);
        check("{seed}.png", false).unwrap();
        check("{seed}/a.png", false).unwrap();
        assert!(message(check("a.JPG", false)).contains("PNG"));
        assert!(message(check("none/{n}.png", false)).contains("does not exist"));
        std::fs::write(to("a.png"), b"").unwrap();
        assert!(message(check("a.png", false)).contains("--overwrite"));
        check("a.png", true).unwrap();
        let latents =
            |overwrite| check_target(&to("b.png"), Some(Path::new(&to("a.png"))), overwrite);
        assert!(message(latents(false)).contains("--overwrite"));
        latents(true).unwrap();
    }

    #[test]
    fn a_run_without_placeholder_is_numbered() {
        let folder = tempfile::tempdir().unwrap();
        let template = folder.path().join("a.png").to_str().unwrap().to_owned();
        let two = |index| Target {
            index,
            count: 2,
            ..target(&template)
        };
        std::fs::write(folder.path().join("a-2.png"), b"").unwrap();
        two(0).check().unwrap();
        assert!(message(two(1).check()).contains("a-2.png"));
        let stdout = Target {
            count: 2,
            ..target("-")
        };
        assert!(matches!(stdout.check(), Err(Error::Usage(_))));
        target("-").check().unwrap();
    }

    #[test]
    fn latents_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let latents: Vec<f32> = (0..24).map(|i| (i as f32).sin()).collect();
        save_latents(&path, &latents, &[1, 4, 2, 3], false).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor("latents").unwrap();
        assert_eq!(
            (view.dtype(), view.shape()),
            (safetensors::Dtype::F32, [1, 4, 2, 3].as_slice())
        );
        let back: Vec<f32> = view
            .data()
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        assert_eq!(back, latents);
        assert_eq!(file.names(), ["latents"]);
        let misfit = save_latents(&path, &latents, &[1, 4, 2, 2], true);
        assert!(message(misfit).contains("24 latents do not fit"));
    }
}
