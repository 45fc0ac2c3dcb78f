"""The balloon: how big it must be (pure), the file that holds it, the engine that makes it so."""
