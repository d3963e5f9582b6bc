"""An agent loop for verl that gives every answer a seed of its own: two runs draw alike where their models agree.

rollout.agent.default_agent_loop=seeded, with this module among the external libraries.
"""

from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


@register("seeded")
class SeededAgentLoop(SingleTurnAgentLoop):
    async def run(self, sampling_params, **kwargs):
        # verl's rollout.full_determinism has one seed for all: the answers to one prompt would be one answer.
        seed = kwargs["session_id"] + 1000 * (kwargs["index"] + 1000 * kwargs["global_steps"])
        return await super().run({**sampling_params, "seed": seed}, **kwargs)
