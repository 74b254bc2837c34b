rootProject.name = "model"
