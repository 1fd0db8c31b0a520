//! What a run tells while it goes, and how it is stopped.

use crate::output::Image;

/// Something that has happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A notice for the user: something was cut, ignored or corrected.
    Warning(String),
    /// The texts are encoded.
    Encoded,
    /// A step is done.
    Step {
        /// Steps done.
        done: usize,
        /// Steps in all, over all batches.
        total: usize,
    },
    /// A network enlarges a picture for a second pass.
    Enlarging {
        /// Tiles done.
        done: usize,
        /// Tiles in all.
        total: usize,
    },
    /// The autoencoder reads or paints a picture tile by tile.
    Tile {
        /// Tiles done, those that are only looked at included.
        done: usize,
        /// Tiles in all.
        total: usize,
    },
    /// What the pictures of the batch are going to be, side by side; where [`super::Request::preview`] asks for it.
    Preview(Image),
    /// The latents are being decoded.
    Decoding,
}

/// What the listener wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Stop as soon as possible; the run ends with [`crate::Error::Interrupted`].
    Stop,
}

/// Receives events.
pub type Listener<'a> = dyn FnMut(Event) -> Control + 'a;

/// What tells a listener of an autoencoder's tiles.
pub(super) fn tiles<'a>(
    listener: &'a mut Listener<'_>,
) -> impl FnMut(usize, usize) -> crate::Result<()> + 'a {
    |done, total| send(listener, Event::Tile { done, total })
}

/// Sends an event and turns a wish to stop into the error that ends the run.
pub(super) fn send(listener: &mut Listener<'_>, event: Event) -> crate::Result<()> {
    match listener(event) {
        Control::Continue => Ok(()),
        Control::Stop => Err(crate::Error::Interrupted),
    }
}
