#include <algorithm>
#include <iostream>
#include <stdexcept>
#include <nlohmann/json.hpp>
#include <onnxruntime_cxx_api.h>
#define STB_IMAGE_IMPLEMENTATION
#include <stb_image.h>

int main(int, char** args) {
    Ort::Env env;
    Ort::Session session(env, args[1], Ort::SessionOptions());
    Ort::AllocatorWithDefaultOptions heap;
    auto classes = nlohmann::json::parse(session.GetModelMetadata().LookupCustomMetadataMapAllocated("classes", heap).get());
    int width, height;
    uint8_t* pixels = stbi_load(args[2], &width, &height, nullptr, 3);
    if (!pixels) throw std::runtime_error(stbi_failure_reason());
    int64_t shape[] = {1, height, width, 3};
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto images = Ort::Value::CreateTensor<uint8_t>(memory, pixels, size_t(3) * height * width, shape, 4);
    auto name = session.GetOutputNameAllocated(0, heap);
    const char *inputs[] = {"images"}, *outputs[] = {name.get()};
    auto results = session.Run(Ort::RunOptions(), inputs, &images, 1, outputs, 1);
    auto probs = results[0].GetTensorData<float>();
    auto best = std::max_element(probs, probs + classes.size()) - probs;
    std::cout << classes[best].get<std::string>() << ' ' << probs[best] << std::endl;
}
