"""The bundled small world: a language, its episodes, a verifier, and a model that really learns in context."""
