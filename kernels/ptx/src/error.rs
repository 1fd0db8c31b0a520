//! What can go wrong, and where.

/// What a kernel did that it must not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An access outside of every allocation, variable or window, or after the memory was freed.
    Bounds,
    /// An address that is no multiple of the access's size.
    Alignment,
    /// An address of one state space used in another.
    Space,
    /// A collective instruction that lanes of its member mask do not execute.
    Lanes,
    /// Two threads touch the same bytes with nothing that orders them.
    Race,
    /// Bytes of an asynchronous copy were used or overwritten before it was waited for.
    InFlight,
    /// A thread ended with asynchronous copies that it never waited for.
    Pending,
    /// A barrier that cannot be completed, or is entered by part of a warp.
    Barrier,
    /// The kernel ran `trap`.
    Trap,
}

/// A fault of a running kernel, with the exact place.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What was done.
    pub kind: Kind,
    /// The kernel.
    pub kernel: String,
    /// Line of the PTX text, from 1.
    pub line: u32,
    /// The instruction.
    pub text: String,
    /// `ctaid`.
    pub block: [u32; 3],
    /// `tid`.
    pub thread: [u32; 3],
    /// What was expected and what was found.
    pub reason: String,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "kernel {}, ptx line {}: `{}`, block {:?}, thread {:?}: {}",
            self.kernel, self.line, self.text, self.block, self.thread, self.reason
        )
    }
}

/// What can go wrong.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The text is no PTX, or PTX that is not interpreted.
    #[error("ptx line {line}: {reason}: `{text}`")]
    Parse {
        /// Line of the text, from 1.
        line: u32,
        /// The statement.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A launch that a driver would refuse.
    #[error("cannot launch {kernel}: {reason}")]
    Launch {
        /// The kernel.
        kernel: String,
        /// Why.
        reason: String,
    },
    /// A wrong use of the device's memory by the host.
    #[error("device memory at {address:#x}: {reason}")]
    Memory {
        /// The address.
        address: u64,
        /// What is wrong.
        reason: String,
    },
    /// A fault of a running kernel.
    #[error("{0}")]
    Fault(Box<Fault>),
}

impl Error {
    /// What the kernel did, if it is a fault of a running kernel.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        match self {
            Self::Fault(fault) => Some(fault.kind),
            _ => None,
        }
    }
}

/// A fault before its place is known: the lane, what and why.
#[derive(Debug)]
pub(crate) struct Trap(pub(crate) Box<(Kind, u32, String)>);

/// Makes a [`Trap`] of a lane.
#[cold]
pub(crate) fn trap(kind: Kind, lane: u32, reason: impl Into<String>) -> Trap {
    Trap(Box::new((kind, lane, reason.into())))
}
