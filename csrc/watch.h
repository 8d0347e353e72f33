// Notices that dictionaries, lists, classes and functions have changed, without a look at what they hold, and objects
// and tensors have become of another kind.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace cet {

// Remembers the contents of containers by address. `unchanged()` is exact for everything but an object that was replaced
// by another at the same address, which cannot happen while the owner of the watch keeps the first one alive.
class Watch {
 public:
  // `entries` holds (container, skipped keys or None): a dict with the keys whose values may change, a list, a class
  // or a function, of which code and defaults are watched. Of `objects` the classes are watched, of `tensors` what
  // `property`, a descriptor of their class, gives.
  Watch(const pybind11::list& entries, const pybind11::list& objects, const pybind11::list& tensors,
        pybind11::object property)
      : property_(std::move(property)) {
    if (Py_TYPE(property_.ptr())->tp_descr_get == nullptr) throw pybind11::type_error("property is no descriptor");
    for (const pybind11::handle object : objects) {
      classes_.emplace_back(pybind11::reinterpret_borrow<pybind11::object>(object), pybind11::type::of(object));
    }
    for (const pybind11::handle tensor : tensors) {
      properties_.emplace_back(pybind11::reinterpret_borrow<pybind11::object>(tensor), property_of(tensor));
    }
    for (const pybind11::handle entry : entries) {
      const auto pair = pybind11::cast<pybind11::tuple>(entry);
      Watched watched;
      watched.container = pybind11::reinterpret_borrow<pybind11::object>(pair[0]);
      watched.skipped = pybind11::reinterpret_borrow<pybind11::object>(pair[1]);
      record(watched);
      watched_.push_back(std::move(watched));
    }
  }

  bool unchanged() {
    for (Watched& watched : watched_) {
      if (!same(watched)) return false;
    }
    for (const auto& [object, type] : classes_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != type.ptr()) return false;
    }
    for (const auto& [tensor, value] : properties_) {
      if (!property_of(tensor).is(value)) return false;
    }
    return true;
  }

 private:
  struct Watched {
    pybind11::object container, skipped;
    std::vector<std::pair<PyObject*, PyObject*>> items;  // of a list: (nullptr, item)
    uint64_t version = 0;
  };

  pybind11::object property_of(const pybind11::handle tensor) const {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    PyObject* value = Py_TYPE(property_.ptr())->tp_descr_get(property_.ptr(), tensor.ptr(), type);
    if (value == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
  }

  static std::array<PyObject*, 3> parts_of(PyObject* function) {
    return {PyFunction_GET_CODE(function), PyFunction_GET_DEFAULTS(function), PyFunction_GET_KW_DEFAULTS(function)};
  }

  // CPython gives a class another tag when the class or a base of it has changed, at the next look-up of an attribute.
  static uint64_t tag_of(PyObject* type) { return reinterpret_cast<PyTypeObject*>(type)->tp_version_tag; }

  // CPython 3.11 and 3.12 number each state of a dictionary. Later versions do not do so reliably.
  static uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
    (void)dict;
    return 0;
#endif
  }

  static void record(Watched& watched) {
    PyObject* container = watched.container.ptr();
    if (PyType_Check(container)) {
      Py_XDECREF(PyObject_GetAttrString(container, "forward"));
      PyErr_Clear();
      watched.version = tag_of(container);
    } else if (PyFunction_Check(container)) {
      for (PyObject* part : parts_of(container)) watched.items.emplace_back(nullptr, part);
    } else if (PyDict_Check(container)) {
      watched.version = version_of(container);
      Py_ssize_t position = 0;
      PyObject *key, *value;
      while (PyDict_Next(container, &position, &key, &value)) watched.items.emplace_back(key, value);
    } else {
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container); ++i) {
        watched.items.emplace_back(nullptr, PyList_GET_ITEM(container, i));
      }
    }
  }

  static bool same(Watched& watched) {
    PyObject* container = watched.container.ptr();
    if (PyType_Check(container)) return watched.version != 0 && tag_of(container) == watched.version;
    if (PyFunction_Check(container)) {
      size_t i = 0;
      for (PyObject* part : parts_of(container)) {
        if (part != watched.items[i++].second) return false;
      }
      return true;
    }
    const auto size = static_cast<Py_ssize_t>(watched.items.size());
    if (PyList_Check(container)) {
      if (PyList_GET_SIZE(container) != size) return false;
      for (Py_ssize_t i = 0; i < size; ++i) {
        if (PyList_GET_ITEM(container, i) != watched.items[i].second) return false;
      }
      return true;
    }
    const uint64_t version = version_of(container);
    if (version != 0 && version == watched.version) return true;
    if (PyDict_Size(container) != size) return false;
    Py_ssize_t position = 0, i = 0;
    PyObject *key, *value;
    while (PyDict_Next(container, &position, &key, &value)) {
      const auto& [old_key, old_value] = watched.items[i++];
      if (key != old_key) return false;
      if (value != old_value) {
        if (watched.skipped.is_none()) return false;
        const int skipped = PySet_Contains(watched.skipped.ptr(), key);
        if (skipped < 0) throw pybind11::error_already_set();
        if (skipped == 0) return false;
      }
    }
    watched.version = version;
    return true;
  }

  std::vector<Watched> watched_;
  std::vector<std::pair<pybind11::object, pybind11::object>> classes_, properties_;
  pybind11::object property_;
};

inline void bind_watch(pybind11::module_& module) {
  pybind11::class_<Watch>(module, "Watch", "Notices changes of dictionaries, lists, classes, functions and tensors.")
      .def(pybind11::init<const pybind11::list&, const pybind11::list&, const pybind11::list&, pybind11::object>(),
           pybind11::arg("entries"), pybind11::arg("objects"), pybind11::arg("tensors"), pybind11::arg("property"))
      .def("unchanged", &Watch::unchanged,
           "Whether every container holds the same objects, and objects and tensors are of the same kind still.");
}

}  // namespace cet
