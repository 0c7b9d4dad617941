"""The methods that ERTACache is compared with, one file a method, in the same harness.

They live beside the experiments and not in `erta`: a user's pipeline needs none of them, some wrap hooks that
diffusers ships itself, and all of them are set up from a configuration. What they have in common with `erta` (hook,
sites, trace) is `erta.online`; what is common to them here is in `knob` (equal budgets), `constants` (published
numbers) and `counting` (what diffusers' own caches really compute).
"""
