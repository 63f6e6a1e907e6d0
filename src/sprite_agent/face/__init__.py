"""The agent's face: who may call, how calls are taken in and answered, and what the outside can see of it."""
