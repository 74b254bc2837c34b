// SPDX-License-Identifier: Apache-2.0
plugins { application }

repositories { mavenCentral() }

dependencies { implementation("com.microsoft.onnxruntime:onnxruntime:${property("onnxruntimeVersion")}") }

java { toolchain { languageVersion = JavaLanguageVersion.of(17) } }

application { mainClass = "model.Example" }

tasks.register<JavaExec>("golden") {
    description = "Runs the model on the golden samples and compares."
    group = "verification"
    classpath = sourceSets["main"].runtimeClasspath
    mainClass = "model.Check"
}
