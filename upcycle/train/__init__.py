"""Trains dense models and mixtures of experts through one Lightning module."""
