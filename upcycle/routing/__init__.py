"""Routing in training: one router for every MoE type, its balancing losses and statistics."""
