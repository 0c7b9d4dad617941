"""The methods, one file each, in one harness; what several of them share is in `common`.

They live beside the experiments and not in `erta`: a user's pipeline needs none of them, some wrap hooks that diffusers ships
itself, and all of them are set up from a configuration. What they have in common with `erta` (hook, sites, trace) is
`erta.online`; `common` has equal budgets (`knob`), published numbers (`published`) and what other libraries' caches really
compute (`counting`).
"""
