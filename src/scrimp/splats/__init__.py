"""Scenes of 3-D Gaussian splats: read, write, compress, render, train.

A scene is a `Splats`; every format reads into one and is written from one, every codec gives one back.
"""
