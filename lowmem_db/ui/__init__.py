"""A local page to start, steer and watch runs: it starts the commands of this package, and does nothing else.

The page holds no state: runs, drafts and jobs are files, and whatever takes long is a process of its own. A server
that is killed, and a page that is closed, stop nothing.
"""
