"""Where the metrics of a run go besides `metrics.jsonl`: TensorBoard's files, Weights & Biases, MLflow."""
