// SPDX-License-Identifier: Apache-2.0
//! Compiles `native/model.c` with the system's C compiler (`CC`, or `cc`) against `ONNXRUNTIME_ROOT`, an unpacked
//! release of ONNX Runtime with `include/` and `lib/`; without it, against an installed one.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=native");
    println!("cargo:rerun-if-env-changed=ONNXRUNTIME_ROOT");
    println!("cargo:rerun-if-env-changed=CC");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let root = env::var_os("ONNXRUNTIME_ROOT").map(PathBuf::from);
    let mut compile = Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()));
    compile.args(["-std=c11", "-O2", "-fPIC", "-Wall", "-Wextra", "-c", "native/model.c", "-o"]);
    compile.arg(out.join("model.o"));
    for folder in include_folders(root.as_deref()) {
        compile.arg("-I").arg(folder);
    }
    run(&mut compile);
    run(Command::new("ar").arg("crs").arg(out.join("libmodel_c.a")).arg(out.join("model.o")));
    println!("cargo:rustc-link-search=native={}", out.display());
    if let Some(lib) = root.map(|root| root.join("lib")) {
        println!("cargo:rustc-link-search=native={}", lib.display());
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
    println!("cargo:rustc-link-lib=static=model_c");
    println!("cargo:rustc-link-lib=dylib=onnxruntime");
    println!("cargo:rustc-link-lib=dylib=m");
}

/// Where releases of ONNX Runtime, and packages of it, keep the headers.
fn include_folders(root: Option<&Path>) -> Vec<PathBuf> {
    let include = root.map_or_else(|| PathBuf::from("/usr/include"), |root| root.join("include"));
    let nested = ["onnxruntime", "onnxruntime/core/session"];
    let found = nested.iter().map(|name| include.join(name)).filter(|folder| folder.is_dir());
    root.map(|_| include.clone()).into_iter().chain(found).collect()
}

fn run(command: &mut Command) {
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{command:?} failed: {status}"),
        Err(error) => panic!("{command:?} did not start: {error}"),
    }
}
