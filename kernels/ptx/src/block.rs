//! A block: its warps run one after the other, each until it waits at a barrier.

use crate::error::{Kind, Trap, trap};
use crate::exec::Machine;
use crate::lanes::lanes;
use crate::op::{BarrierResult, NONE, Op};
use crate::warp::{Stop, Warp};

/// A fault and whose it is.
pub(crate) struct Failure {
    pub(crate) trap: Trap,
    pub(crate) warp: usize,
    pub(crate) pc: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    /// At the barrier of the operation of this number.
    Waiting(u32),
    Done,
}

/// Who has come to a barrier since it was last passed.
#[derive(Clone, Default)]
struct Gate {
    expected: u32,
    arrived: u32,
    /// Warps that wait, and others with the time of their arrival.
    warps: Vec<(usize, Option<u32>)>,
    /// Threads with a true and with a false predicate.
    votes: [u32; 2],
}

/// Runs a block whose warps have been reset.
pub(crate) fn run(machine: &mut Machine<'_>, warps: &mut [Warp]) -> Result<(), Failure> {
    let mut states = vec![State::Ready; warps.len()];
    let mut gates = vec![Gate::default(); 16];
    while states.contains(&State::Ready) {
        for w in 0..warps.len() {
            while states[w] == State::Ready {
                let stop = warps[w].run(machine).map_err(|trap| Failure {
                    trap,
                    warp: w,
                    pc: warps[w].pc,
                })?;
                states[w] = match stop {
                    Stop::Done => State::Done,
                    Stop::Barrier(at) => {
                        let waits =
                            arrive(machine, warps, w, at, &mut gates).map_err(|trap| Failure {
                                trap,
                                warp: w,
                                pc: at,
                            })?;
                        if waits {
                            State::Waiting(at)
                        } else {
                            State::Ready
                        }
                    }
                };
                gates
                    .iter_mut()
                    .filter(|g| g.expected != 0 && g.arrived == g.expected)
                    .for_each(|g| pass(machine, warps, &mut states, g));
            }
        }
    }
    stuck(&states).map_or(Ok(()), Err)
}

/// What is wrong where no warp can go on.
fn stuck(states: &[State]) -> Option<Failure> {
    let (warp, pc) = states.iter().enumerate().find_map(|(w, s)| match s {
        State::Waiting(at) => Some((w, *at)),
        _ => None,
    })?;
    let list = |wanted: &dyn Fn(&State) -> bool| -> Vec<usize> {
        states
            .iter()
            .enumerate()
            .filter(|(_, s)| wanted(s))
            .map(|(w, _)| w)
            .collect()
    };
    let (here, elsewhere, done) = (
        list(&|s| *s == State::Waiting(pc)),
        list(&|s| matches!(s, State::Waiting(at) if *at != pc)),
        list(&|s| *s == State::Done),
    );
    let reason = format!(
        "warps {here:?} wait here for ever: warps {elsewhere:?} wait at other barriers, warps {done:?} have ended"
    );
    Some(Failure {
        trap: trap(Kind::Barrier, 0, reason),
        warp,
        pc,
    })
}

/// A warp comes to a barrier. Whether it waits.
fn arrive(
    machine: &mut Machine<'_>,
    warps: &[Warp],
    w: usize,
    at: u32,
    gates: &mut [Gate],
) -> Result<bool, Trap> {
    let Op::Barrier(barrier) = &machine.code.insts[at as usize].op else {
        return Ok(false);
    };
    let warp = &warps[w];
    let lane = warp.mask.trailing_zeros();
    let id = warp.r32[barrier.id as usize][lane as usize];
    let all = warps.len() as u32 * 32;
    let expected = if barrier.count == NONE {
        all
    } else {
        warp.r32[barrier.count as usize][lane as usize]
    };
    if expected == 0 || expected > all || !expected.is_multiple_of(32) {
        return Err(trap(
            Kind::Barrier,
            lane,
            format!("a barrier of {expected} threads in a block of {all}"),
        ));
    }
    let gate = &mut gates[id as usize];
    if gate.arrived != 0 && gate.expected != expected {
        let known = gate.expected;
        return Err(trap(
            Kind::Barrier,
            lane,
            format!("barrier {id} of {expected} threads, at which others wait for {known}"),
        ));
    }
    if gate.warps.iter().any(|(other, _)| *other == w) {
        return Err(trap(
            Kind::Barrier,
            lane,
            format!("warp {w} comes to barrier {id} again before it is passed"),
        ));
    }
    // after an exit of some of its lanes a warp would be counted whole
    let born = warp.born();
    if warp.live != born {
        return Err(trap(
            Kind::Barrier,
            lane,
            format!(
                "lanes {:#010x} of the warp ended before this barrier",
                born & !warp.live
            ),
        ));
    }
    let p = warp.preds[barrier.p.0 as usize];
    let p = if barrier.p.1 { !p } else { p } & warp.live;
    gate.votes[0] += p.count_ones();
    gate.votes[1] += (warp.live & !p).count_ones();
    gate.expected = expected;
    gate.arrived += 32;
    let time = barrier.arrive.then(|| machine.shared.arrive());
    gate.warps.push((w, time));
    Ok(!barrier.arrive)
}

/// Lets the warps of a barrier go.
fn pass(machine: &mut Machine<'_>, warps: &mut [Warp], states: &mut [State], gate: &mut Gate) {
    machine.shared.barrier(&gate.warps);
    for (w, _) in gate.warps.iter().filter(|(_, time)| time.is_none()) {
        if let State::Waiting(at) = states[*w]
            && let Op::Barrier(barrier) = &machine.code.insts[at as usize].op
            && let Some(d) = barrier.d
        {
            let value = match barrier.result {
                BarrierResult::Nothing | BarrierResult::Count => u64::from(gate.votes[0]),
                BarrierResult::And => u64::from(gate.votes[1] == 0),
                BarrierResult::Or => u64::from(gate.votes[0] != 0),
            };
            let mask = warps[*w].mask;
            lanes(mask).for_each(|lane| warps[*w].put(d, lane, value));
        }
        states[*w] = State::Ready;
    }
    *gate = Gate::default();
}
