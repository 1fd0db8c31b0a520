//! The names that a pickle may ask for. Python would import and call them; here each only stands for what it makes, and nothing is run.
//!
//! Whatever is not in these tables is refused by name: a file that asks for it is either no checkpoint or an attack.

use safetensors::Dtype;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    /// `torch._utils._rebuild_tensor` and its later versions: storage, offset, size, stride and more.
    Tensor,
    /// Gives its first argument: `_rebuild_parameter`, `torch.Size`.
    First,
    /// `torch._tensor._rebuild_from_type_v2`: function, type, its arguments, state.
    FromType,
    /// A mapping, perhaps of given pairs.
    Dict,
    /// An object that is a mapping, whose state holds its tensors: `torch.nn.ParameterDict`.
    Holder,
    /// A storage of this type; of bytes if none.
    Storage(Option<Dtype>),
    /// A type of elements.
    Type(Dtype),
    /// Anything that is known to be in checkpoints and of no use here.
    Opaque,
}

/// Whole modules whose classes training tools leave in checkpoints; their objects are passed over.
const OPAQUE_MODULES: &[&str] = &[
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "omegaconf",
    "argparse",
    "pathlib",
    "datetime",
    "numpy",
    "torch.optim",
    "torch.nn.parameter",
];

/// What of Python's own modules is harmless; the modules themselves are not.
const OPAQUE_NAMES: &[(&str, &str)] = &[
    ("_codecs", "encode"),
    ("builtins", "bytearray"),
    ("builtins", "bytes"),
    ("builtins", "complex"),
    ("builtins", "dict"),
    ("builtins", "float"),
    ("builtins", "frozenset"),
    ("builtins", "int"),
    ("builtins", "list"),
    ("builtins", "object"),
    ("builtins", "set"),
    ("builtins", "slice"),
    ("builtins", "str"),
    ("builtins", "tuple"),
    ("collections", "Counter"),
    ("collections", "deque"),
    ("copyreg", "_reconstructor"),
    ("torch", "Tensor"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.torch_version", "TorchVersion"),
    ("typing", "Any"),
];

/// What `module.name` stands for; `None` for what is not known to be harmless.
pub(super) fn resolve(module: &str, name: &str) -> Option<Global> {
    // Python 2's names
    let module = match module {
        "__builtin__" => "builtins",
        "copy_reg" => "copyreg",
        other => other,
    };
    match (module, name) {
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3") => {
            Some(Global::Tensor)
        }
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state")
        | ("torch", "Size") => Some(Global::First),
        ("torch._tensor", "_rebuild_from_type_v2") => Some(Global::FromType),
        ("collections", "OrderedDict" | "defaultdict") => Some(Global::Dict),
        ("torch.nn.modules.container", "ParameterDict") => Some(Global::Holder),
        ("torch.storage", "UntypedStorage" | "_UntypedStorage") | ("torch", "UntypedStorage") => {
            Some(Global::Storage(None))
        }
        ("torch" | "torch.cuda", name) if name.ends_with("Storage") => {
            storage(name.trim_end_matches("Storage")).map(|dtype| Global::Storage(Some(dtype)))
        }
        ("torch", name) if element(name).is_some() => element(name).map(Global::Type),
        (module, name) if OPAQUE_NAMES.contains(&(module, name)) => Some(Global::Opaque),
        (module, name) if is_opaque(module, name) => Some(Global::Opaque),
        _ => None,
    }
}

/// Whether the class is of a module whose objects are passed over. `numpy` has functions that run code, and dotted names reach anything.
fn is_opaque(module: &str, name: &str) -> bool {
    let below = |root: &&&str| {
        let rest = module.strip_prefix(**root);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    if name.contains('.') {
        return false;
    }
    match OPAQUE_MODULES.iter().find(below) {
        Some(&"numpy") => {
            let arrays = matches!(module, "numpy.core.multiarray" | "numpy._core.multiarray")
                && matches!(name, "scalar" | "_reconstruct");
            let plain = module == "numpy" && matches!(name, "dtype" | "ndarray");
            arrays || plain || (module == "numpy.dtypes" && name.ends_with("DType"))
        }
        Some(_) => {
            name.starts_with(|c: char| c.is_ascii_uppercase()) || module.starts_with("omegaconf")
        }
        None => false,
    }
}

fn storage(name: &str) -> Option<Dtype> {
    Some(match name {
        "Double" => Dtype::F64,
        "Float" => Dtype::F32,
        "Half" => Dtype::F16,
        "BFloat16" => Dtype::BF16,
        "Long" => Dtype::I64,
        "Int" => Dtype::I32,
        "Short" => Dtype::I16,
        "Char" => Dtype::I8,
        "Byte" => Dtype::U8,
        "Bool" => Dtype::BOOL,
        _ => return None,
    })
}

fn element(name: &str) -> Option<Dtype> {
    Some(match name {
        "float64" | "double" => Dtype::F64,
        "float32" | "float" => Dtype::F32,
        "float16" | "half" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "int64" | "long" => Dtype::I64,
        "int32" | "int" => Dtype::I32,
        "int16" | "short" => Dtype::I16,
        "int8" => Dtype::I8,
        "uint8" => Dtype::U8,
        "uint16" => Dtype::U16,
        "uint32" => Dtype::U32,
        "uint64" => Dtype::U64,
        "bool" => Dtype::BOOL,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_harmless_has_a_meaning() {
        assert_eq!(
            resolve("torch._utils", "_rebuild_tensor_v2"),
            Some(Global::Tensor)
        );
        assert_eq!(
            resolve("torch", "HalfStorage"),
            Some(Global::Storage(Some(Dtype::F16)))
        );
        assert_eq!(
            resolve("torch", "bfloat16"),
            Some(Global::Type(Dtype::BF16))
        );
        for (module, name) in [
            (
                "pytorch_lightning.callbacks.model_checkpoint",
                "ModelCheckpoint",
            ),
            ("numpy.core.multiarray", "scalar"),
            ("__builtin__", "set"),
            ("omegaconf.dictconfig", "DictConfig"),
        ] {
            assert_eq!(resolve(module, name), Some(Global::Opaque), "{module}");
        }
        for (module, name) in [
            ("os", "system"),
            ("posix", "system"),
            ("builtins", "eval"),
            ("__builtin__", "getattr"),
            ("torch", "load"),
            ("torch.serialization", "load"),
            ("numpy", "load"),
            ("numpy.testing._private.utils", "runstring"),
            ("pytorch_lightning_evil", "X"),
            ("lightning.x", "os.system"),
            ("pathlib", "os"),
            ("torch", "ComplexFloatStorage"),
        ] {
            assert_eq!(resolve(module, name), None, "{module}.{name}");
        }
    }
}
