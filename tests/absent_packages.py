"""Programs for processes in which a package was never installed."""

# sys.meta_path as on a machine where the named packages were never installed: find_spec answers None, nothing raises
ABSENT = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *args):
        if name.partition(".")[0] in {names}: return None
        return self.finder.find_spec(name, *args)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
