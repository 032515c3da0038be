"""Pretrained models that ship in packages, each as a task with a metric; what the swapped attention does to it."""
