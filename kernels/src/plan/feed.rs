//! What comes into a call and goes out of it, whatever machine runs it: which inputs are wanted, and in what order their numbers lie.

use super::Feed;
use super::ir::{Input, Output, Program, Rate, Value};
use crate::{Error, Result};

/// A machine that takes inputs.
pub(super) trait Fed {
    /// Whether what is computed once a run is there.
    fn constants(&mut self) -> &mut bool;

    /// Makes the given timestep the current row, computing its row if it was not prepared.
    ///
    /// # Errors
    /// When memory is short, or it is not one for the whole batch.
    fn seek(&mut self, program: &Program, timestep: &[f32]) -> Result<()>;

    /// Puts an input's numbers, of which there are enough, into its place, channels last.
    ///
    /// # Errors
    /// When they cannot be brought there.
    fn import(&mut self, program: &Program, input: &Input, values: &[f32]) -> Result<()>;
}

/// Takes a call's inputs; those that are constant during a run may be missing once they were there.
///
/// # Errors
/// When an input is missing or has the wrong size.
pub(super) fn feed(machine: &mut impl Fed, program: &Program, feeds: &[Feed<'_>]) -> Result<()> {
    for input in &program.inputs {
        let value = &program.values[input.value];
        match feeds.iter().find(|feed| feed.name == input.name) {
            Some(feed) if value.rate == Rate::Timestep => machine.seek(program, feed.values)?,
            Some(feed) if feed.values.len() != value.len() => {
                return Err(Error::Shape {
                    op: "plan input",
                    expected: format!("{} numbers for `{}`", value.len(), input.name),
                    got: feed.values.len().to_string(),
                });
            }
            Some(feed) => {
                machine.import(program, input, feed.values)?;
                *machine.constants() &= value.rate != Rate::Run;
            }
            None if value.rate == Rate::Run && *machine.constants() => {}
            None => {
                return Err(Error::Weights(format!(
                    "input `{}` of the network is missing",
                    input.name
                )));
            }
        }
    }
    Ok(())
}

/// The timestep of a batch.
///
/// # Errors
/// When there are several, or none.
pub(super) fn one_timestep(timestep: &[f32]) -> Result<f32> {
    let [first, rest @ ..] = timestep else {
        return Err(Error::Weights("the timestep is missing".to_owned()));
    };
    if rest.iter().any(|t| t != first) {
        return Err(Error::Weights(
            "one timestep for the whole batch is expected".to_owned(),
        ));
    }
    Ok(*first)
}

/// For each number of an input's value the place that it is given at: pictures come planar.
pub(super) fn input_order(value: &Value, input: &Input) -> impl Fn(usize) -> usize + Sync {
    let planar = input.shape.len() == 4;
    let (pixels, channels) = (value.pixels, value.channels);
    move |i: usize| {
        let (row, channel) = (i / channels, i % channels);
        if planar {
            (row / pixels * channels + channel) * pixels + row % pixels
        } else {
            i
        }
    }
}

/// For each number of a result in the recorded order of axes its place in the value, which repeats.
pub(super) fn output_order(value: &Value, output: &Output) -> impl Fn(usize) -> usize + Sync {
    let planar = output.shape.len() == 4;
    let (pixels, channels, len) = (value.pixels, value.channels, value.len());
    move |i: usize| {
        if !planar {
            return i % len;
        }
        let (plane, pixel) = (i / pixels, i % pixels);
        ((plane / channels * pixels + pixel) * channels + plane % channels) % len
    }
}
