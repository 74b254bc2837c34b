// SPDX-License-Identifier: Apache-2.0
//! Runs the model on the golden samples and prints one line an output:
//!
//!     OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON
//!
//! Exit code 0 where every output is within its tolerance. Usage: check [FOLDER]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use model::golden::{self, Golden, Kind};
use model::Model;

#[derive(Default)]
struct Outcome {
    difference: f64,
    tolerance: f64,
    from_python: f64,
}

fn compare(model: &Model, golden: &[Golden]) -> Result<BTreeMap<String, Outcome>, Box<dyn std::error::Error>> {
    let mut outcomes = BTreeMap::<String, Outcome>::new();
    for sample in golden.chunk_by(|a, b| a.sample == b.sample) {
        let inputs: Vec<_> =
            sample.iter().filter(|g| g.kind == Kind::Input).map(|g| (g.name.as_str(), &g.tensor)).collect();
        let outputs = model.run(&inputs)?;
        for expected in sample.iter().filter(|g| g.kind != Kind::Input) {
            let actual = outputs.get(&expected.name).ok_or_else(|| format!("no output '{}'", expected.name))?;
            let difference = golden::largest_difference(actual, &expected.tensor);
            let outcome = outcomes.entry(expected.name.clone()).or_default();
            if expected.kind == Kind::Python {
                outcome.from_python = outcome.from_python.max(difference);
            } else {
                outcome.difference = outcome.difference.max(difference);
                outcome.tolerance = expected.tolerance.unwrap_or(0.0);
            }
        }
    }
    Ok(outcomes)
}

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    let model = Model::open(folder.join("model/model.onnx"), 1)?;
    let outcomes = compare(&model, &golden::read(&folder.join("golden"))?)?;
    for (name, outcome) in &outcomes {
        println!("{name} {:e} {:e} {:e}", outcome.difference, outcome.tolerance, outcome.from_python);
    }
    let within = outcomes.values().all(|outcome| outcome.difference <= outcome.tolerance);
    Ok(if within { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
