//! Files in: hostile and broken files each get their own sentence, every family is recognised from names and shapes, folders open in
//! all their forms, and whatever passes the header's checks lies inside the file.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod build;
mod containers;
mod coverage;
mod families;
mod folders;
mod hostile;
mod hostile_containers;
mod inspect;
