//! Whole runs on a card that an interpreter of the kernels' PTX plays, against diffusers. The card is the whole process's, so each test runs itself again
//! in a process of its own.

use std::process::Command;

use crate::models::check_first_run;
use crate::support::card::VARIABLE;
use crate::support::weights::Case;

/// Whether this process has the card; another one that has runs the test otherwise.
fn has_card(test: &str) -> bool {
    if std::env::var_os(VARIABLE).is_some() {
        return true;
    }
    let mut again = Command::new(std::env::current_exe().unwrap());
    // as many processors as make some layers large, and split others
    again.args([test, "--exact"]).env(VARIABLE, "8");
    let done = again.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
    false
}

#[test]
fn a_run_of_a_consistency_model() {
    if has_card("card::a_run_of_a_consistency_model") {
        check_first_run("lcm", &Case::load("lcm"));
        assert!(sd_kernels::gpu::chosen().is_some_and(|card| card.driver().held().1 > 0));
    }
}
