// SPDX-License-Identifier: Apache-2.0
pluginManagement { repositories { google(); mavenCentral(); gradlePluginPortal() } }

dependencyResolutionManagement { repositories { google(); mavenCentral() } }

rootProject.name = "model"
