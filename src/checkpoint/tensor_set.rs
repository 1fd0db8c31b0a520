//! The tensors of one component, from one file or several, by name.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::printable::printable;
use super::tensor_file::TensorFile;
use super::tensor_info::TensorInfo;
use crate::error::{Error, Result};

/// Tensors of one file or several, each name once.
#[derive(Debug)]
pub struct TensorSet {
    files: Vec<Arc<TensorFile>>,
    /// Name → file, and the tensor there.
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

impl TensorSet {
    /// The tensors of `files`.
    ///
    /// # Errors
    /// [`Error::BadModel`] when two files hold a tensor of the same name: which one is meant cannot be known.
    pub fn new(files: Vec<TensorFile>) -> Result<Self> {
        let files: Vec<_> = files.into_iter().map(Arc::new).collect();
        let mut tensors = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for info in file.entries() {
                match tensors.entry(info.name.clone()) {
                    Entry::Vacant(place) => {
                        place.insert((index, info.clone()));
                    }
                    Entry::Occupied(taken) => {
                        let other = files
                            .get(taken.get().0)
                            .map_or_else(String::new, |file| file_name(file.path()));
                        let reason = format!(
                            "tensor `{}` is also in {other}, so it is not known which one is meant; download both files again",
                            printable(&info.name)
                        );
                        return Err(Error::bad_model(file.path(), reason));
                    }
                }
            }
        }
        Ok(Self { files, tensors })
    }

    /// The tensors of a file inside the program; `name` stands for its path in messages.
    ///
    /// # Errors
    /// [`Error::BadModel`] when the bytes are not a good file of tensors.
    pub fn from_static(name: impl Into<PathBuf>, bytes: &'static [u8]) -> Result<Self> {
        Self::new(vec![TensorFile::from_static(name, bytes)?])
    }

    /// The tensors whose names begin with `prefix`, under what follows it. The files are shared, not opened again.
    pub fn strip_prefix(&self, prefix: &str) -> Self {
        let stripped = |(name, place): (&str, &(usize, TensorInfo))| {
            (name[prefix.len()..].to_owned(), place.clone())
        };
        Self {
            files: self.files.clone(),
            tensors: self.places_below(prefix).map(stripped).collect(),
        }
    }

    /// The files, in the order in which they were given.
    pub fn files(&self) -> impl Iterator<Item = &TensorFile> {
        self.files.iter().map(Arc::as_ref)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The names that begin with `prefix`, sorted.
    pub fn names_below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.places_below(prefix).map(|(name, _)| name)
    }

    /// The first name at or behind `start` in sorted order.
    pub(super) fn names_from(&self, start: &str) -> Option<&str> {
        let range = (Bound::Included(start), Bound::Unbounded);
        self.tensors
            .range::<str, _>(range)
            .next()
            .map(|(name, _)| name.as_str())
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Type, shape and place of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(_, info)| info)
    }

    /// The dimensions of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.info(name).map(|info| info.shape.as_slice())
    }

    /// The bytes of a tensor: see [`TensorFile::bytes`].
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such tensor, and those of [`TensorFile::bytes`].
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let missing = || Error::NotFound {
            what: format!("tensor `{}`", printable(name)),
            hint: match self.files.first() {
                Some(file) => format!("it is not in {}", file.path().display()),
                None => "there are no files".to_owned(),
            },
        };
        let (file, info) = self.place(name).ok_or_else(missing)?;
        file.bytes(info)
    }

    /// The bytes of a tensor are not needed any more: see [`TensorFile::release`].
    pub fn release(&self, name: &str) {
        if let Some((file, info)) = self.place(name) {
            file.release(info);
        }
    }

    fn place(&self, name: &str) -> Option<(&TensorFile, &TensorInfo)> {
        let (file, info) = self.tensors.get(name)?;
        Some((self.files.get(*file)?.as_ref(), info))
    }

    fn places_below<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a (usize, TensorInfo))> {
        self.tensors
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .map(|(name, place)| (name.as_str(), place))
            .take_while(move |(name, _)| name.starts_with(prefix))
    }
}

/// The last part of a path, for messages.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
