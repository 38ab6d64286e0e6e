"""The vocabulary: frozen values of the mesh, standard library only."""
