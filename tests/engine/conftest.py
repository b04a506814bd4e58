from tests.e2e.conftest import shared_world, world

__all__ = ["shared_world", "world"]
