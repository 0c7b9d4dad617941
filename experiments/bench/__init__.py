"""What is measured on samples: fidelity, scenes, image scores, VBench."""
