// The loss of every exit and its gradient, row by row: both softmaxes of a row are in cache when its gradients are written.
#include <cmath>
#include <type_traits>

#include "kernels_of_capability.h"
#include "parallel.h"
#include "vec.h"

namespace cet::CET_CAPABILITY {

namespace {

constexpr int64_t kRowsPerTask = 16;  // fixed, so that the order of the sums does not depend on the threads
constexpr int64_t kBytesPerLogit = 16;  // an exponential and a logarithm cost more than the bytes read

struct Softmax {
  float* exps;  // exp(x - max), zeros behind them up to a whole register
  float max, sum;

  float log_sum() const { return logf(sum); }
};

template <class T>
Vec load_upto(const T* from, int64_t n, float fill) {
  return n >= kLanes ? load(from) : load_partial(from, n, fill);
}

template <class T>
void store_upto(T* to, Vec v, int64_t n) {
  n >= kLanes ? store(to, v) : store_partial(to, v, n);
}

template <class T>
Softmax softmax(const T* logits, int64_t classes, float* exps) {
  Vec largest = splat(-INFINITY);
  for (int64_t k = 0; k < classes; k += kLanes) largest = max(load_upto(logits + k, classes - k, -INFINITY), largest);
  const float top = max(largest);
  Vec total = {};
  for (int64_t k = 0; k < classes; k += kLanes) {
    const Vec e = exp(load_upto(logits + k, classes - k, -INFINITY) - top);
    store(exps + k, e);
    total += e;
  }
  return {exps, top, sum(total)};
}

// The first of the largest, as torch.max gives it; the last class where none is, in a row with NaN.
template <class T>
int64_t argmax(const T* logits, int64_t classes, float largest) {
  int64_t k = 0;
  while (k < classes - 1 && to_float(logits[k]) != largest) ++k;
  return k;
}

template <class T>
void cross_entropy_gradient(const Softmax& p, int64_t label, int64_t classes, float scale, T* grad) {
  for (int64_t k = 0; k < classes; k += kLanes) {
    store_upto(grad + k, load(p.exps + k) * (scale / p.sum), classes - k);
  }
  store(grad + label, (p.exps[label] / p.sum - 1.0f) * scale);
}

// KL(teacher || student); the logits of both are read again, from the first-level cache. A class that the teacher rules
// out adds nothing, whatever the student's logit.
template <class T>
float soft_divergence(const T* teacher_logits, const Softmax& teacher, const T* student_logits, const Softmax& student,
                      int64_t classes) {
  const float teacher_shift = teacher.max + teacher.log_sum(), student_shift = student.max + student.log_sum();
  Vec total = {};
  for (int64_t k = 0; k < classes; k += kLanes) {
    const Vec log_p = load_upto(teacher_logits + k, classes - k, 0.0f) - teacher_shift;
    const Vec log_q = load_upto(student_logits + k, classes - k, 0.0f) - student_shift;
    const Vec p = load(teacher.exps + k);
    total += p == 0.0f ? Vec{} : p * (log_p - log_q);
  }
  return sum(total) / teacher.sum;
}

template <class T>
void soft_gradient(const Softmax& teacher, const Softmax& student, int64_t classes, float scale, T* grad) {
  for (int64_t k = 0; k < classes; k += kLanes) {
    const Vec q = load(student.exps + k) * (scale / student.sum), p = load(teacher.exps + k) * (scale / teacher.sum);
    store_upto(grad + k, q - p, classes - k);
  }
}

template <class T>
void zero(T* grad, int64_t classes) {
  for (int64_t k = 0; k < classes; ++k) store(grad + k, 0.0f);
}

// What differences of probabilities are multiplied by to be gradients of the loss; in float16, where small ones would be
// lost, by kHalfGradientScale, and the rest is the caller's.
template <class T>
float gradient_scale(double scale) {
  return std::is_same_v<T, float16> ? kHalfGradientScale : static_cast<float>(scale);
}

template <class T>
void loss_rows(const LossArguments& arguments) {
  const LossConfig& s = arguments.config;
  const ExitLogits* const exits = arguments.exits;
  int64_t labelled = 0;
  for (int64_t row = 0; row < s.rows; ++row) labelled += s.labels[row] != kUnlabelled;
  const double supervised_scale = 1.0 / static_cast<double>(labelled > 0 ? labelled : 1);
  const float consistency_scale = s.consistency_weight / static_cast<float>(s.rows);

  const int64_t padded = (s.classes + kLanes - 1) / kLanes * kLanes;
  const int workers = workers_for(s.exits * s.rows * s.classes * 2 * kBytesPerLogit, arguments.threads);
  const Buffer<float> scratch(workers * 3 * padded);
  const int64_t tasks = (s.rows + kRowsPerTask - 1) / kRowsPerTask;
  const Buffer<ExitTerms> sums(tasks * s.exits);
  for_each_task(workers, tasks, [&](int worker, int64_t task) {
    float* exps = scratch.get() + worker * 3 * padded;
    ExitTerms* task_sums = sums.get() + task * s.exits;
    for (int64_t k = 0; k < s.exits; ++k) task_sums[k] = {};
    const int64_t end = (task + 1) * kRowsPerTask < s.rows ? (task + 1) * kRowsPerTask : s.rows;
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      const auto clean_row = [&](const ExitLogits& e) { return static_cast<const T*>(e.clean) + row * e.clean_stride; };
      const ExitLogits& last = exits[s.exits - 1];
      const Softmax final_clean = softmax(clean_row(last), s.classes, exps);
      for (int64_t k = 0; k < s.exits; ++k) {
        const ExitLogits& e = exits[k];
        const bool is_final = k == s.exits - 1;
        const T* clean_logits = clean_row(e);
        const T* student_logits = static_cast<const T*>(e.perturbed) + row * e.perturbed_stride;
        const Softmax clean = is_final ? final_clean : softmax(clean_logits, s.classes, exps + padded);
        const Softmax student = softmax(student_logits, s.classes, exps + 2 * padded);

        const int64_t label = s.labels[row];
        if (label != kUnlabelled) {
          task_sums[k].supervised += clean.max + clean.log_sum() - to_float(clean_logits[label]);
        }
        const Softmax& teacher = s.final_teacher ? final_clean : clean;
        const T* teacher_logits = s.final_teacher ? clean_row(last) : clean_logits;
        const float confident = 1.0f / teacher.sum >= s.min_confidence ? 1.0f : 0.0f;
        const int64_t target = s.hard_target ? argmax(teacher_logits, s.classes, teacher.max) : -1;
        const float divergence = s.hard_target
                                     ? student.max + student.log_sum() - to_float(student_logits[target])
                                     : soft_divergence(teacher_logits, teacher, student_logits, student, s.classes);
        task_sums[k].confident += confident;
        task_sums[k].consistency += confident * divergence;

        if (e.clean_grad != nullptr) {
          T* grad = static_cast<T*>(e.clean_grad) + row * s.classes;
          if (label != kUnlabelled) {
            cross_entropy_gradient(clean, label, s.classes, gradient_scale<T>(e.weight * supervised_scale), grad);
          } else {
            zero(grad, s.classes);
          }
        }
        if (e.perturbed_grad != nullptr) {
          T* grad = static_cast<T*>(e.perturbed_grad) + row * s.classes;
          const float scale = gradient_scale<T>(e.weight * consistency_scale) * confident;
          if (s.hard_target) {
            cross_entropy_gradient(student, target, s.classes, scale, grad);
          } else {
            soft_gradient(teacher, student, s.classes, scale, grad);
          }
        }
      }
    }
  });
  const double rows = static_cast<double>(s.rows);
  for (int64_t k = 0; k < s.exits; ++k) {
    ExitTerms total = {};
    for (int64_t task = 0; task < tasks; ++task) {
      const ExitTerms& part = sums.get()[task * s.exits + k];
      total.supervised += part.supervised;
      total.consistency += part.consistency;
      total.confident += part.confident;
    }
    arguments.terms[k] = {total.supervised * supervised_scale, total.consistency / rows, total.confident / rows};
  }
}

}  // namespace

void consistent_exit_loss(const LossArguments& arguments) {
  switch (arguments.config.dtype) {
    case DType::float32: return loss_rows<float>(arguments);
    case DType::bfloat16: return loss_rows<bfloat16>(arguments);
    case DType::float16: return loss_rows<float16>(arguments);
  }
}

}  // namespace cet::CET_CAPABILITY
