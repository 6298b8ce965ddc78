"""From a trained model to text and pictures: steppers, modality rules, samplers, the engine and the viewer."""
