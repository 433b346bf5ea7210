"""Checkpoint -> smaller checkpoint, with a report of what it cost.

puyu quantize --model runs/nano/ppo --bits 4 --out runs/nano/int4
"""
